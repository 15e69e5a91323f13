"""Label-free distillation of backbones (SSLD), and detectors fine-tuned from them.

The folders of the repository are this package's parts: `ssld.shared`, `ssld.stage1_ssld`, `ssld.stage2_detect`, `ssld.pipelines`, linked here so
that no other name is taken where the package is installed.
"""
