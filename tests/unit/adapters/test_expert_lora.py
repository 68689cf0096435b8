"""Adapters of experts: beside PEFT's for parameters, beside dense updates in float64, merged, refused."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.helpers.adapters import adapted, difference, disturb, exported, logits_of, their_logits, video_batch
from tests.helpers.allocations import allocated_peak
from tests.helpers.tiny import CPU, Tiny, assert_same_gradients, load_model, load_prepared, loss_and_gradients
from tests.unit.adapters.test_lora import assert_all_agree
from tests.unit.models.test_experts import experts_apart_of
from tests.unit.preparation.test_memory import long_row
from vft.adapters.lora import LoRAExperts, adapted_layers, initialise, target_of
from vft.adapters.peft_format import start_from
from vft.adapters.targets import choose_trainable, match_targets
from vft.cli.merge_lora import merge
from vft.common.errors import UserError
from vft.config.run import LoraConfig, load
from vft.models import build
from vft.models.experts import MATRICES, ExpertWeights
from vft.models.flops import FlopCounter
from vft.models.pretrained import SINGLE_FILE, Pretrained
from vft.parallel.parallelize import checkpoint_activations
from vft.preparation.memory import MODES, run_step
from vft.training.losses import cross_entropy

EXPERTS = "language_model.experts.*"
UP, DOWN = (f"language_model.experts.{name}" for name in MATRICES)
EXPORTS = {
    "beside attention": LoraConfig(rank=4, alpha=8, targets=("language_model.*", EXPERTS)),
    "alone": LoraConfig(rank=8, alpha=12, targets=(EXPERTS,)),
    "gate and up": LoraConfig(rank=3, alpha=5.5, targets=("language_model.q_proj", UP)),
    "down": LoraConfig(rank=2, alpha=8, rslora=True, targets=("vision_encoder.qkv", DOWN)),
    "one layer": LoraConfig(rank=2, alpha=6, targets=("language_model.model.language_model.layers.2.mlp.experts.*",)),
}
RANKS = LoraConfig(rank=2, alpha=5, targets=("language_model.*", EXPERTS), ranks={UP: 5, EXPERTS: 3}, alphas={DOWN: 9})


@pytest.fixture
def moe(make_tiny: Callable[[str, str], Tiny]) -> Tiny:
    return make_tiny("qwen3_vl_moe", "tied")


@pytest.fixture(params=["qwen3_vl_moe", "qwen3_5_moe"])
def each_moe(request: pytest.FixtureRequest, make_tiny: Callable[[str, str], Tiny]) -> Tiny:
    return make_tiny(request.param, "tied")


# ------------------------------------------------------------------------------------------------- beside PEFT


@pytest.mark.parametrize("name", EXPORTS)
def test_written_here_all_agree(each_moe: Tiny, tmp_path: Path, name: str) -> None:
    model = assert_all_agree(each_moe, video_batch(each_moe), tmp_path, EXPORTS[name])
    found, layers = (sum(isinstance(one, kind) for one in model.modules()) for kind in (LoRAExperts, ExpertWeights))
    assert found == {"one layer": 2, "gate and up": layers, "down": layers}.get(name, 2 * layers)


def test_ranks_of_their_own(moe: Tiny, tmp_path: Path) -> None:
    """PEFT looks for the patterns of parameters among modules, and wrongly says that it ignores them."""
    batch = video_batch(moe)
    ours = exported(moe, tmp_path, RANKS)
    assert {layer.rank for _, layer in adapted_layers(ours) if isinstance(layer, LoRAExperts)} == {5, 3}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys")
        theirs = PeftModel.from_pretrained(moe.load(moe.path), str(tmp_path))
    wanted = logits_of(ours, batch)
    assert difference(their_logits(theirs, batch, moe), wanted) <= 2 * moe.family.tolerance
    loaded = load_model(str(moe.path), tmp_path, torch.float32, CPU).model
    assert difference(logits_of(loaded, batch), wanted) == 0


def test_gone_on_with_and_on_a_base_of_4_bits(moe: Tiny, tmp_path: Path) -> None:
    """Training starts from what was exported; answers on packed experts are those of training on them."""
    lora = EXPORTS["beside attention"]
    ours = exported(moe, tmp_path, lora)
    settings = {"output_dir": "runs/x", "model": {"path": str(moe.path), "adapter": str(tmp_path)}}
    again, pretrained = adapted(moe, lora, seed=5)
    start_from(again, load({**settings, "lora": {"rank": 4, "alpha": 8, "targets": list(lora.targets)}}), pretrained)
    for (name, one), (_, other) in zip(again.named_parameters(), ours.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    less, _ = adapted(moe, LoraConfig(rank=4, alpha=8, targets=("language_model.*", UP)))
    config = load({**settings, "lora": {"rank": 4, "alpha": 8, "targets": ["language_model.*", UP]}})
    with pytest.raises(UserError, match=r"experts\.adapters\.down_proj\.lora_A\.weight: found in the file alone"):
        start_from(less, config, pretrained)

    batch = video_batch(moe)
    trained, _ = load_prepared(moe.path, lambda it: choose_trainable(it, lora, ()), quantize="nf4")
    start_from(trained, config, pretrained)
    loaded = load_model(str(moe.path), tmp_path, torch.float32, CPU, quantize="nf4").model
    assert torch.equal(logits_of(loaded, batch), logits_of(trained.eval(), batch))
    assert difference(logits_of(loaded, batch), logits_of(ours, batch)) > 1e-3


PEFT_CONFIGS: dict[str, dict[str, Any]] = {
    "beside attention": {"target_modules": ["q_proj"], "target_parameters": [f"mlp.experts.{m}" for m in MATRICES]},
    "alone": {"target_modules": [], "target_parameters": list(MATRICES), "use_rslora": True},
    "one matrix": {"target_modules": ["v_proj"], "target_parameters": ["experts.gate_up_proj"]},
    "other matrices in other layers": {
        "target_modules": [],
        "target_parameters": ["layers.0.mlp.experts.down_proj", "layers.2.mlp.experts.gate_up_proj"],
    },
    "patterns": {
        "target_modules": ["q_proj"],
        "target_parameters": list(MATRICES),
        "rank_pattern": {r".*\.0\.mlp\.experts\.down_proj": 3, "gate_up_proj": 5},
        "alpha_pattern": {"experts.down_proj": 2},
    },
}


@pytest.mark.parametrize("name", PEFT_CONFIGS)
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
def test_written_by_peft(each_moe: Tiny, tmp_path: Path, name: str) -> None:
    batch = video_batch(each_moe)
    torch.manual_seed(0)
    config = PeftConfig(r=4, lora_alpha=6, init_lora_weights=False, **PEFT_CONFIGS[name])
    theirs = get_peft_model(each_moe.load(each_moe.path), config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    wanted = their_logits(theirs, batch, each_moe)
    assert difference(wanted, their_logits(each_moe.theirs, batch, each_moe)) > 0.05
    loaded = load_model(str(each_moe.path), tmp_path / "adapter", torch.float32, CPU).model
    assert difference(logits_of(loaded, batch), wanted) <= 2 * each_moe.family.tolerance
    merge(str(each_moe.path), tmp_path / "adapter", tmp_path / "merged")
    assert (
        difference(their_logits(each_moe.load(tmp_path / "merged"), batch, each_moe), wanted)
        <= 2 * each_moe.family.tolerance
    )


def test_gradients_are_pefts(moe: Tiny, tmp_path: Path) -> None:
    batch = video_batch(moe)
    exported(moe, tmp_path, EXPORTS["beside attention"])
    model, _ = adapted(moe, EXPORTS["beside attention"])
    disturb(model)
    _, found = loss_and_gradients(model, batch)
    theirs = PeftModel.from_pretrained(moe.load(moe.path), str(tmp_path), is_trainable=True)
    logits = theirs(**moe.inputs(batch)).logits[0][batch.target_index_N]
    torch.nn.functional.cross_entropy(logits, batch.target_ids_N, reduction="sum").backward()
    wanted = {n.replace(".default", ""): p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    names = {f"base_model.model.{name}": name for name in found}
    renamed = {}
    for long, name in names.items():
        nested = ".base_layer" if "gate_up_proj" in name else ""
        for matrix in MATRICES:
            long = long.replace(f".adapters.{matrix}", nested)
        renamed[long] = found[name]
    assert_same_gradients(renamed, wanted, 1e-4)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"target_parameters": ["mlp.gate.weight"]}, r"target_parameters = \['mlp.gate.weight'\]: must be a list"),
        ({"target_parameters": "experts.down_proj"}, "target_parameters = 'experts.down_proj': must be a list"),
        ({"use_dora": True}, "use_dora = true with target_parameters"),
        ({"target_parameters": ["experts.down_proj"]}, r"experts\.base_layer: the model has no such layer"),
        ({"target_parameters": None}, r"experts(\.base_layer)?: the model has no such layer"),
    ],
)
def test_files_that_do_not_agree(moe: Tiny, tmp_path: Path, change: dict[str, Any], named: str) -> None:
    exported(moe, tmp_path, EXPORTS["alone"])
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=named):
        load_model(str(moe.path), tmp_path, torch.float32, CPU)


def test_exchanged_matrices_are_refused(moe: Tiny, tmp_path: Path) -> None:
    """As an older PEFT wrote them on the parameters of transformers 5: A of the width of the output."""
    exported(moe, tmp_path, EXPORTS["gate and up"])
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if ".experts.lora_A" in name]:
        other = name.replace("lora_A", "lora_B")
        tensors[name], tensors[other] = tensors[other].T.contiguous(), tensors[name].T.contiguous()
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"gate_up_proj\.lora_A\.weight: shape \[12, 48\] in the adapter, \[12, 64\]"):
        load_model(str(moe.path), tmp_path, torch.float32, CPU)


@pytest.mark.parametrize("setting", ["dropout=0.1", "dora=true", 'init="pissa"'])
def test_what_peft_does_not_do_with_experts(setting: str) -> None:
    base = {"output_dir": "runs/x", "model": {"path": "base"}, "lora": {"targets": ["language_model.*", EXPERTS]}}
    with pytest.raises(UserError, match=rf"{setting.split('=')[0]} = .*{EXPERTS[:-1]}.* in targets needs "):
        load(base, [f"lora.{setting}"])


# --------------------------------------------------------------------------------------------- what is adapted


def test_only_where_named(moe: Tiny) -> None:
    model = load_prepared(moe.path, lambda it: None)[0]
    patterns = [
        "language_model.*",
        "language_model.*_proj",
        "language_model.*.mlp.*",
        EXPERTS,
        UP,
        "language_model.*experts*",
    ]
    matched = match_targets(model, patterns)
    assert not [name for pattern in patterns[:3] for name in matched[pattern] if "experts" in name]
    layers = [f"model.language_model.layers.{i}.mlp.experts" for i in (0, 2)]
    assert list(map(target_of, matched[EXPERTS])) == [f"{layer}.{matrix}" for layer in layers for matrix in MATRICES]
    assert list(map(target_of, matched[UP])) == [f"{layer}.gate_up_proj" for layer in layers]
    assert matched[patterns[-1]] == matched[EXPERTS]


def test_a_model_without_experts(tiny: Tiny) -> None:
    with pytest.raises(UserError, match=r"experts\.\*'?: matches no linear layer"):
        match_targets(load_prepared(tiny.path, lambda it: None)[0], [EXPERTS])


def test_table_and_flops(moe: Tiny) -> None:
    """A pair of 4 experts has rank x (in + out) x 4 numbers, of which 2 experts work for a token, in 6 FLOPs each."""
    tables: list[Any] = []
    lora = LoraConfig(rank=4, targets=(EXPERTS,))
    plain = load_prepared(moe.path, lambda it: it.requires_grad_(False))[0]
    model, _ = load_prepared(moe.path, lambda it: tables.append(choose_trainable(it, lora, ())))
    pairs = 2 * 4 * ((64 + 48) + (24 + 64))  # in both layers, for each expert
    assert [(row.modules, row.parameters) for row in tables[0]] == [(4, 4 * pairs)]
    assert FlopCounter(model).token - FlopCounter(plain).token == 6 * 2 * pairs


# ------------------------------------------------------------------------------------------------ the computation


@pytest.mark.parametrize("rank", [3, 8])
def test_output_and_gradients_are_those_of_a_dense_update(rank: int) -> None:
    """In float64, the update of every expert added to its matrix; one expert has no rows."""
    made = ExpertWeights(32, 24, 5, 0.4).requires_grad_(False).double()
    made.adapters.update(
        {m: LoRAExperts(made, m, LoraConfig(), rank, 7.0).requires_grad_(True).double() for m in MATRICES}
    )
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(parameter.numel()))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(11, 32, generator=generator).double().requires_grad_()
    shares, counts = torch.rand(11, generator=generator).double(), [3, 1, 0, 5, 2]
    ends = torch.tensor(counts).cumsum(0).int()

    def dense() -> Tensor:
        out = []
        for expert, rows in enumerate(x.split(counts)):
            weights = []
            for name in MATRICES:
                a, b = (getattr(made.adapters[name], m).weight for m in ("lora_A", "lora_B"))
                update = b[:, expert::5] @ a[expert * rank : (expert + 1) * rank]
                weights.append(getattr(made, name)[expert] + 7.0 / rank * update.T)
            gate, up = (rows @ weights[0]).chunk(2, dim=-1)
            out.append(torch.nn.functional.silu(gate) * up @ weights[1])
        return torch.cat(out) * shares[:, None]

    names = [name for name, p in made.named_parameters() if p.requires_grad]
    inputs = [x, *(made.get_parameter(name) for name in names)]
    found, wanted = made(x, shares, ends), dense()
    torch.testing.assert_close(found, wanted)
    factors = torch.randn(found.shape, generator=generator).double()
    pairs = (torch.autograd.grad((out * factors).sum(), inputs) for out in (found, wanted))
    assert_same_gradients(*(dict(zip(["x", *names], one, strict=True)) for one in pairs), tolerance=1e-9)


def test_no_matrix_of_an_updates_size(moe: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward make no tensor of the size of all experts' matrices."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            if isinstance(made, Tensor) and not func.is_view:
                sizes.append(made.numel())
            return made

    made = ExpertWeights(64, 64, 16, 0.1).requires_grad_(False)
    made.adapters.update({m: LoRAExperts(made, m, LoraConfig(), 2, 7.0).requires_grad_(True) for m in MATRICES})
    ends = torch.arange(1, 17).int()
    with Watch():
        made(torch.randn(16, 64, requires_grad=True), torch.rand(16), ends).sum().backward()
    assert max(sizes) <= made.down_proj.numel() / 4


@pytest.mark.parametrize("mode", ["mlp", "selective", "full"])
@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_recomputed_and_packed(moe: Tiny, mode: str, quantize: str) -> None:
    """The same loss and gradients; weights in 4 bits, too."""
    batch, lora = video_batch(moe), EXPORTS["beside attention"]

    def outcome(mode: str) -> tuple[Tensor, dict[str, Tensor]]:
        model, _ = load_prepared(moe.path, lambda it: choose_trainable(it, lora, ()), quantize=quantize)
        initialise(model, 0)
        disturb(model)
        checkpoint_activations(model, mode)
        return loss_and_gradients(model, batch)

    loss, found = outcome(mode)
    wanted_loss, wanted = outcome("none")
    assert torch.equal(loss, wanted_loss)
    assert_same_gradients(found, wanted, 1e-6)
    assert sum(".experts.adapters." in name for name in found) == 2 * 4


# --------------------------------------------------------------------------------------------------------- merging


@pytest.mark.parametrize("kind", ["tied", "bf16"])
@pytest.mark.parametrize("is_turned", [False, True])
def test_merged_in_the_orientation_of_the_base(
    make_tiny: Callable[[str, str], Tiny], tmp_path: Path, kind: str, is_turned: bool
) -> None:
    """PEFT's merge, in the files' dtype; transformers 5 saves the matrices of experts turned."""
    moe = make_tiny("qwen3_vl_moe", kind)
    base = moe.path
    if is_turned:
        base = tmp_path / "base"
        moe.load(moe.path, torch.float32 if kind == "tied" else torch.bfloat16).save_pretrained(base)
        for file in (*moe.path.glob("*token*"), *moe.path.glob("chat*"), moe.path / "preprocessor_config.json"):
            (base / file.name).write_bytes(file.read_bytes())
    exported(Tiny(base, moe.family), tmp_path / "adapter", EXPORTS["beside attention"])
    merge(str(base), tmp_path / "adapter", tmp_path / "merged")
    shapes = [
        {n: tuple(t.shape) for f in folder.glob("*.safetensors") for n, t in load_file(f).items()}
        for folder in (base, tmp_path / "merged")
    ]
    assert shapes[0] == shapes[1]
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    assert shapes[0][name] == ((4, 48, 64) if is_turned else (4, 64, 48))
    theirs = PeftModel.from_pretrained(moe.load(base), str(tmp_path / "adapter"))
    wanted = dict(theirs.merge_and_unload().named_parameters())
    found = moe.load(tmp_path / "merged")
    for name, parameter in found.named_parameters():
        rounded = wanted[name] if kind == "tied" else wanted[name].bfloat16().float()
        torch.testing.assert_close(parameter, rounded, rtol=2**-7 if kind == "bf16" else 1e-5, atol=2e-6, msg=name)


def test_merged_once(moe: Tiny, tmp_path: Path) -> None:
    """Without any record, the merged experts show the adapter."""
    exported(moe, tmp_path / "adapter", LoraConfig(rank=2, alpha=64, targets=(EXPERTS,)))
    (tmp_path / "adapter" / "vft.json").unlink()
    merge(str(moe.path), tmp_path / "adapter", tmp_path / "merged")
    (tmp_path / "merged" / "vft.json").unlink()
    assert (tmp_path / "merged" / SINGLE_FILE).is_file()
    with pytest.raises(UserError, match="is merged into"):
        load_model(str(tmp_path / "merged"), tmp_path / "adapter", torch.float32, CPU)


@pytest.mark.parametrize("mode", MODES)
def test_planned_memory_is_that_of_a_real_step(moe: Tiny, mode: str) -> None:
    row, lora = long_row(moe), LoraConfig(rank=8, targets=("language_model.*", EXPERTS))
    planned = build(Pretrained.open(str(moe.path)), torch.float32)
    model, _ = load_prepared(moe.path, lambda it: choose_trainable(it, lora, ()))
    choose_trainable(planned, lora, ())
    initialise(model, 0)
    for one in (planned, model):
        checkpoint_activations(one, mode)
    real = allocated_peak(lambda: cross_entropy(model, row).backward())
    assert run_step(planned, cross_entropy, row, CPU).peak == pytest.approx(real, rel=0.02)


def test_merged_into_experts_apart(make_tiny: Callable[[str, str], Tiny], tmp_path: Path) -> None:
    """A base with the matrices of experts one by one, as transformers saves Qwen3.5-MoE: as into one with all together.
    Its shared expert is adapted too."""
    together = make_tiny("qwen3_5_moe", "tied")
    apart = experts_apart_of(together, tmp_path / "apart")
    exported(together, tmp_path / "adapter", EXPORTS["beside attention"])
    (tmp_path / "adapter" / "vft.json").unlink()  # with the fingerprint of the other files
    assert merge(str(apart), tmp_path / "adapter", tmp_path / "merged apart") > 12
    merge(str(together.path), tmp_path / "adapter", tmp_path / "merged")
    models = [load_model(str(tmp_path / name), None, torch.float32, CPU).model for name in ("merged apart", "merged")]
    for (name, one), (_, other) in zip(*(model.named_parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6, msg=name)
    adapted = load_model(str(together.path), tmp_path / "adapter", torch.float32, CPU).model
    batch = video_batch(together)
    assert difference(logits_of(models[0], batch), logits_of(adapted, batch)) <= 2 * together.family.tolerance
    assert difference(logits_of(adapted, batch), logits_of(together.ours(), batch)) > 0.05
