"""What is exported is what was trained, read back by the libraries alone."""

from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM

from scaletrain.checkpoint import reader
from scaletrain.export import export_run
from scaletrain.shelf import Shelf
from tests.launch import run
from tests.recipes.tiny import make_data, overrides

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of LoRA over the averaged weights of another run."""
    folder = tmp_path_factory.mktemp("export")
    make_data(folder)
    average = ["players.model.ema={decay: 0.9}", "--root", folder]
    run(["run", "lm/pretrain", *overrides("lm/pretrain", folder), *average])
    change = ["networks.model.path=null", f"networks.model.from=run:{folder}/lm-pretrain/model"]
    run(["run", "lm/lora", *overrides("lm/lora", folder), *change, *average])
    return folder


def test_peft_loads_an_adapter_and_the_base_it_was_trained_over(adapted: Path) -> None:
    written = export_run(adapted / "lm-lora", adapted / "out")
    assert [p.name for p in written] == ["model-base", "model"]
    checkpoint = reader.newest(adapted / "lm-lora")
    assert checkpoint is not None
    trained = Shelf(adapted / "lm-lora").open(checkpoint, "model").eval()
    loaded = AutoPeftModelForCausalLM.from_pretrained(adapted / "out" / "model").eval()
    tokens = torch.arange(2, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=tokens).logits, trained(input_ids=tokens).logits, rtol=0, atol=0)


def test_an_export_that_differs_gets_no_name(adapted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scaletrain import export

    original = export.save

    def spoiled(module: torch.nn.Module, *rest: object) -> None:
        original(module, *rest)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.add_(1e-6 * ("lora_B" in name))

    monkeypatch.setattr(export, "save", spoiled)
    with pytest.raises(RuntimeError, match="differs after loading it back"):
        export_run(adapted / "lm-lora", adapted / "spoiled")
    assert not (adapted / "spoiled" / "model").exists()
