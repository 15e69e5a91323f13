# The quickstart in a container, with the two parts of the README's command:
#
#     docker build -t ssld .
#     docker run --rm --shm-size 2g ssld
#
# Without a GPU, PyTorch's CPU builds are smaller: --build-arg TORCH_INDEX=URL names the package index that has them.
FROM python:3.11-slim
ARG TORCH_INDEX
ENV PIP_NO_CACHE_DIR=1
WORKDIR /ssld
COPY . .
RUN if [ -n "$TORCH_INDEX" ]; then pip install --index-url "$TORCH_INDEX" torch torchvision; fi
RUN pip install -e ".[test]"
CMD ["python", "pipelines/run.py", "pipelines/quickstart.yaml"]
