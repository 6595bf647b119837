from ._config import show_config as show_config
