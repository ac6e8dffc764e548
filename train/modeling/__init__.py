"""The model: how it is built, run on packed documents, and scored. Never imports DeepSpeed."""
