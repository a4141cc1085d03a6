from tests.trainer.conftest import tiny_config, tiny_store, tiny_study, trained_config

__all__ = ["tiny_config", "tiny_store", "tiny_study", "trained_config"]
