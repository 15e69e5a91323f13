"""What the exports of both stages share: graph files and model cards."""
