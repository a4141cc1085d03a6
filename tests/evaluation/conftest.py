from tests.trainer.conftest import tiny_config, tiny_store, tiny_study

__all__ = ["tiny_config", "tiny_store", "tiny_study"]
