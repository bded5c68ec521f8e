"""Every field of PEFT's configurations with its default, as `save_pretrained` writes it: `peft_defaults.json`, by `peft_type`."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from peft import (
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
)

VIRTUAL = dict(num_virtual_tokens=5)
CONFIGS = [
    LoraConfig(),
    IA3Config(),
    PromptTuningConfig(**VIRTUAL),
    PromptEncoderConfig(**VIRTUAL),
    PrefixTuningConfig(**VIRTUAL),
    TrainableTokensConfig(token_indices=[1]),
]


def written(config):
    with TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return json.loads((Path(folder) / "adapter_config.json").read_text())


def main():
    defaults = {config.peft_type.value: written(config) for config in CONFIGS}
    text = json.dumps(defaults, indent=1, sort_keys=True)
    (Path(__file__).parent / "peft_defaults.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
