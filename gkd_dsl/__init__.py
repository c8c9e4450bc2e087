"""gkd-dsl: a small language for distilling large language models."""
