"""Export capture against module capture: outputs, gradients, sizes, modes, lifecycles; and what it refuses."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import peftc
from tests.support.adapters import perturb
from tests.support.programs import KINDS, gradients, loss_of, program_inputs, program_model, tensors

LINEARS = peftc.LoraConfig(r=4, target_modules="all-linear")
FAST = ("llama",)


def pair(model: nn.Module, spec: Any, inputs: Any) -> tuple[Any, Any]:
    """The same adapters on the same model, captured module by module and as one program."""
    torch.manual_seed(0)
    one = perturb(peftc.compile(model, spec))
    other = peftc.compile(model, spec, capture="export", inputs=inputs)
    other.load_state_dict(one.state_dict())
    return one.eval(), other.eval()


def require_equal(one: Any, other: Any, inputs: dict[str, Tensor]) -> None:
    """Outputs and gradients, bit for bit: the same ops of the same operands."""
    results: list[Any] = []
    for model in (one, other):
        model.zero_grad()
        torch.manual_seed(1)  # Dropout draws the same.
        results.append(model(**inputs))
        loss_of(results[-1]).backward()
    ours, theirs = tensors(results[1]), tensors(results[0])
    assert ours.keys() == theirs.keys()
    assert type(results[0]) is type(results[1])
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    found, expected = gradients(other), gradients(one)
    assert expected
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in FAST else (pytest.mark.slow,)) for kind in KINDS]
)
def test_a_program_is_the_model_whatever_its_sizes_and_mode(kind: str) -> None:
    model = program_model(kind)
    fixed = kind == "mamba"  # Its loop over the tokens is unrolled, and the call says so.
    one, other = pair(model, LINEARS, program_inputs(kind, model))
    assert other.plan.capture == "export"
    assert len(other.plan.edits) == len(one.plan.edits) > 0
    for training in (False, True):
        for rows, length in ((2, 8), (1, 8)) if fixed else ((2, 8), (1, 11), (3, 3)):
            inputs = program_inputs(kind, model, rows, length)
            require_equal(one.train(training), other.train(training), inputs)
    if fixed:
        with pytest.raises(peftc.CaptureError, match=r"input_ids: is of shape \[2, 9\], where the trace fixed"):
            other(**program_inputs(kind, model, 2, 9))


class Raw(nn.Module):
    """Weights that no module of their own computes with, a linear called twice, attention of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.w, self.e = (nn.Parameter(torch.randn(size)) for size in ((6, 5), (6, 7), (7, 4)))
        self.stack, self.b = nn.Parameter(torch.randn(2, 4, 4)), nn.Parameter(torch.randn(6))
        self.attn, self.twice = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.q, self.b)
        x = torch.addmm(x.new_zeros(7), x.flatten(0, 1), self.w).view(*x.shape[:2], 7)
        x = torch.einsum("bti,io->bto", x, self.e)
        x = torch.bmm(self.twice(self.twice(x).relu())[:2], self.stack)
        return self.attn(x, x, x)[0]


def test_weights_are_sites_by_the_ops_that_use_them() -> None:
    torch.manual_seed(0)
    names = ["q", "w", "e", "stack"]
    spec = peftc.LoraConfig(r=2, target_modules=["twice", "attn"], target_parameters=names)
    x = torch.randn(2, 3, 5).double()
    one, other = pair(Raw().double(), spec, {"x": x})
    ops = {site.fqn: site.op for site in other.plan.sites.values()}
    assert ops == {
        "q": "linear", "w": "parameter", "e": "parameter", "stack": "parameter", "attn.in_proj_weight": "linear",
        "attn.out_proj.weight": "linear", "twice": "linear",
    }  # fmt: skip
    x = torch.randn(2, 5, 5).double()
    torch.testing.assert_close(other(x), one(x))
    for model in (one, other):
        model(x).square().sum().backward()
    found = gradients(other)
    for name, gradient in gradients(one).items():
        torch.testing.assert_close(found[name], gradient)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    y = other(x)
    with other.merged():
        torch.testing.assert_close(other(x), y, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_a_weight_rule_reaches_every_use_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.l(self.l(x).relu())

    torch.manual_seed(0)
    model, x = Twice(), torch.randn(2, 4)
    spec = peftc.LoHaConfig(r=2, target_modules=["l"])
    one = perturb(peftc.compile(model, spec))
    for capture, given in (("symbolic", None), ("export", {"x": x})):
        other = peftc.compile(model, spec, capture=capture, inputs=given)
        other.load_state_dict(one.state_dict())
        torch.testing.assert_close(other(x), one(x))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "spec"),
    [
        ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
        ("qwen3_moe", {"target_modules": [], "target_parameters": ["experts.gate_up_proj"]}),
        ("bert", {"target_modules": ["query"], "modules_to_save": ["classifier"], "bias": "lora_only"}),
        ("llama", {"target_modules": ["q_proj", "lm_head", "embed_tokens"], "modules_to_save": ["norm"]}),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        ("llama", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
        ("t5", {"target_modules": ["q", "wo", "encoder.embed_tokens"], "lora_dropout": 0.2}),
    ],
)
def test_experts_saved_modules_biases_ties(kind: str, spec: dict[str, Any]) -> None:
    model = program_model(kind)
    one, other = pair(model, peftc.LoraConfig(r=4, **spec), program_inputs(kind, model))
    inputs = program_inputs(kind, model, 3, 9)
    for training in (False, True):
        require_equal(one.train(training), other.train(training), inputs)
    one.eval(), other.eval()
    y, before = other(**inputs), {name: value.clone() for name, value in other.state_dict().items()}
    with other.merged(untie=True):
        torch.testing.assert_close(other(**inputs)[0], y[0], rtol=1e-4, atol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    with other.disable_adapter(), torch.no_grad():
        assert torch.equal(other(**inputs)[0], model(**inputs)[0])


def test_ia3() -> None:
    model = program_model("llama")
    inputs = program_inputs("llama", model, labels=False)
    spec = peftc.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    one, other = pair(model, spec, inputs)
    require_equal(one, other, inputs)


@pytest.mark.slow
def test_the_lifecycle_needs_no_second_capture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = program_model("llama")
    inputs = program_inputs("llama", model)
    one, other = pair(model, peftc.LoraConfig(r=2, target_modules=["q_proj"]), inputs)
    other.save_pretrained(tmp_path / "first")
    monkeypatch.setattr(torch.export, "export", None)  # Captured once and for all.
    second = peftc.LoraConfig(r=3, target_modules=["down_proj", "q_proj"])
    for compiled in (one, other):
        torch.manual_seed(3)
        compiled.add_adapter("second", second)
        perturb(compiled)
    other.load_state_dict(one.state_dict())
    for names in ("second", ["default", "second"], "default"):
        one.set_adapter(names), other.set_adapter(names)
        require_equal(one, other, inputs)
    assert other.load_adapter(tmp_path / "first", "again").missing_keys == ()
    other.delete_adapter("second")
    copied, pickled = copy.deepcopy(other), pickle.loads(pickle.dumps(other))
    for again in (copied, pickled):
        assert torch.equal(again(**inputs).logits, other(**inputs).logits)
    base = other.unload()
    assert type(base) is type(model)
    assert torch.equal(base(**inputs).logits, model(**inputs).logits)
    monkeypatch.undo()
    loaded = peftc.load(model, tmp_path / "first", capture="export", inputs=inputs)
    plain = peftc.load(model, tmp_path / "first")
    assert torch.equal(loaded(**inputs).logits, plain(**inputs).logits)


@pytest.mark.slow
def test_inputs_that_are_no_tensors_or_make_no_difference() -> None:
    """`use_cache` is fixed; positions of a model that has none are taken and not used."""

    class Ignores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor, unused: Tensor, twice: bool = False) -> Tensor:
            return self.linear(x) * (2 if twice else 1)

    x, spec = torch.randn(2, 3), peftc.LoraConfig(target_modules=["linear"])
    model = Ignores()
    compiled = peftc.compile(model, spec, capture="export", inputs={"x": x, "unused": x, "twice": True})
    assert torch.equal(compiled(x, x, True), 2 * model.linear(x))
    with pytest.raises(peftc.CaptureError, match="twice missing"):
        compiled(x, x)
    llama = program_model("llama")
    inputs = {**program_inputs("llama", llama), "use_cache": False}
    program = peftc.compile(
        llama, spec.model_copy(update={"target_modules": ("q_proj",)}), capture="export", inputs=inputs
    )
    assert torch.equal(program(**inputs).logits, llama(**inputs).logits)
    assert program(**inputs).past_key_values is None


@pytest.mark.slow
def test_a_plan_is_looked_at_first_and_applied_as_it_is() -> None:
    model = program_model("llama")
    inputs = program_inputs("llama", model)
    made = peftc.Plan.from_json(peftc.plan(model, LINEARS, capture="export", inputs=inputs).to_json())
    assert made.capture == "export"
    assert "capture=export" in str(made)
    compiled = peftc.compile(model, made, inputs=inputs)
    assert compiled.plan.edits == made.edits
    with pytest.raises(peftc.CaptureError, match="give inputs="):
        peftc.compile(model, made)


@pytest.mark.slow
def test_node_counts_are_those_of_the_plan() -> None:
    """Merged: the bare program. Unmerged: that, and what each edit adds."""
    model = program_model("llama")
    inputs = program_inputs("llama", model)
    compiled = perturb(peftc.compile(model, LINEARS, capture="export", inputs=inputs))
    bare = len(compiled.program.regions[0].source.graph.nodes)
    added = [node for node in compiled.graph_of("").nodes if "peftc" in node.meta]
    # Each edit's fused op is in the place of the linear that it is on.
    assert len(compiled.graph_of("").nodes) == bare + len(added) - len(compiled.plan.edits)
    per_edit = {edit.site: 0 for edit in compiled.plan.edits}
    for node in added:
        per_edit[list(per_edit)[int(node.meta["peftc"].part.removeprefix("a"))]] += 1
    assert len(set(per_edit.values())) == 1  # Every linear gets the same.
    with compiled.merged():
        assert len(compiled.graph_of("").nodes) == bare
        assert not any("peftc" in node.meta for node in compiled.graph_of("").nodes)


class Norms(nn.Module):
    """Batch norm, dropout as a module and as a function, a constant, and what is computed in train() alone, if `more`."""

    def __init__(self, more: bool = False) -> None:
        super().__init__()
        self.more = more
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding="same"), nn.BatchNorm2d(4)
        self.drop, self.linear = nn.Dropout(0.5), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> dict[str, Any]:
        x = self.drop(self.norm(self.conv(x)).mean((2, 3)))
        x = self.linear(x) + torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
        with torch.no_grad():
            shift = x.mean()
        if self.more and self.training:
            x = x * 2 - shift
        return {"out": F.dropout(x, 0.5, self.training), "all": [x, {"shift": shift}]}


@pytest.mark.parametrize("more", [False, True])
def test_train_and_eval_are_both_in_it(more: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 6, 6)
    spec = peftc.LoraConfig(r=2, target_modules=["conv", "linear"], lora_dropout=0.5)
    one, other = pair(Norms(more), spec, {"x": x})
    for training in (True, False, True):
        one.train(training), other.train(training)
        results: list[Any] = []
        for model in (one, other):
            torch.manual_seed(2)
            results.append(model(x))
            results[-1]["out"].sum().backward()
        assert torch.equal(results[0]["out"], results[1]["out"])
        assert not results[1]["all"][1]["shift"].requires_grad
    found = gradients(other)
    assert all(torch.equal(found[name], value) for name, value in gradients(one).items())
    buffers = dict(other.named_buffers())
    assert all(torch.equal(buffers[name], value) for name, value in one.named_buffers())
    assert int(buffers["base.norm.num_batches_tracked"]) == 2
    other.eval()
    other.base.norm.train()  # A part of it in another mode.
    if more:
        with pytest.raises(peftc.CaptureError, match="norm: is not in the mode of the whole model"):
            other(x)
    else:
        other(x)
        assert int(buffers["base.norm.num_batches_tracked"]) == 3


@pytest.mark.slow
def test_the_program_is_where_its_model_is() -> None:
    model = program_model("llama")
    compiled = peftc.compile(model, LINEARS, capture="export", inputs=program_inputs("llama", model)).to("meta")
    inputs = {name: value.to("meta") for name, value in program_inputs("llama", model, 3, 5).items()}
    logits = compiled(**inputs).logits
    assert logits.device.type == "meta"
    assert logits.shape == (3, 5, 64)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 3), Chooses())

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Chooses(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_what_it_cant_do_is_refused_with_the_way_out() -> None:
    spec, x = peftc.LoraConfig(target_modules=["0"]), torch.randn(2, 3)
    with pytest.raises(peftc.CaptureError, match=r"in inner\.1 \(Chooses\) at .*`return x if x\.sum\(\) > 0 else -x`"):
        peftc.compile(Branching(), spec, capture="export", inputs={"x": x})
    net = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(peftc.CaptureError, match="give inputs="):
        peftc.compile(net, spec, capture="export")
    with pytest.raises(peftc.CaptureError, match="inputs= is for capture='export'"):
        peftc.compile(net, spec, inputs={"input": x})
    with pytest.raises(peftc.CaptureError, match="valid are 'modules', 'symbolic', 'export'"):
        peftc.compile(net, spec, capture="whole")  # type: ignore[arg-type]
    compiled = peftc.compile(net, spec, capture="export", inputs={"input": x})
    with pytest.raises(peftc.CaptureError, match=r"input: is torch.float64 \[2, 3\], and was torch.float32"):
        compiled(x.double())
    with pytest.raises(peftc.CaptureError, match="input missing; y not known"):
        compiled.base(y=x)
    compiled.base[0].register_forward_hook(lambda *_: None)
    with pytest.raises(peftc.CaptureError, match="0: has hooks, which do not run in one flat graph"):
        compiled(x)
    with pytest.raises(peftc.CaptureError, match="0: has hooks"):
        peftc.compile(net.append(nn.Linear(3, 3)), spec, capture="export", inputs={"input": hooked(net) or x})


def hooked(net: nn.Module) -> None:
    next(net.children()).register_forward_pre_hook(lambda *_: None)


@pytest.mark.slow
def test_what_needs_the_models_python_is_refused() -> None:
    model = program_model("llama")
    compiled = peftc.compile(model, LINEARS, capture="export", inputs=program_inputs("llama", model, labels=False))
    ids = program_inputs("llama", model)["input_ids"]
    for use in (
        lambda: compiled.generate(ids),
        compiled.gradient_checkpointing_enable,
        lambda: compiled.resize_token_embeddings(70),
    ):
        with pytest.raises(peftc.AdapterError, match=r"runs as one program.*capture='modules'"):
            use()
    with pytest.raises(peftc.NoMatchError, match="needs capture='modules'"):
        peftc.compile(
            model,
            peftc.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
            capture="export",
            inputs={"input_ids": ids},
        )


@pytest.mark.slow
def test_a_deep_model_without_weights() -> None:
    """Eighty layers on the meta device: every site once, a few nodes more for each."""
    config: Any = program_model("llama").config
    config.num_hidden_layers = 80
    with torch.device("meta"):
        model = type(program_model("llama"))(config)
        ids = torch.zeros(2, 8, dtype=torch.long)
    made = peftc.plan(model, LINEARS, capture="export", inputs={"input_ids": ids})
    assert len(made.edits) == 80 * 7


class Regions(nn.Module):
    """What is computed without gradients: its operands in order, a buffer that follows activations."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.w = nn.Linear(4, 4), nn.Parameter(torch.randn(4))
        self.register_buffer("ema", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        y = h - self.ema
        with torch.no_grad():
            difference = self.w - h
            self.ema.lerp_(h.mean(0), 0.5)
        return y + difference


def test_regions_without_gradients() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4)
    one, other = pair(Regions(), peftc.LoraConfig(r=2, target_modules=["linear"]), {"x": x})
    for _ in range(3):
        for model in (one, other):
            model(x).square().sum().backward()
        assert torch.equal(other.base.ema, one.base.ema)
        assert not other.base.ema.requires_grad
    found = gradients(other)
    assert all(torch.equal(found[name], value) for name, value in gradients(one).items())
    copy.deepcopy(other)


class Sizes(nn.Module):
    """Branches on sizes, whose other side a trace has not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = self.linear(x)
        x = x * 2 if x.shape[1] > 4 else x
        return x + 1 if x.shape[0] % 3 else x + y.shape[1]


def test_what_a_trace_took_for_true_of_sizes_is_asked_in_every_call() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(2, 8, 4), torch.randn(2, 5)
    one, other = pair(Sizes(), peftc.LoraConfig(r=2, target_modules=["linear"]), {"x": x, "y": y})
    for rows, length in ((2, 8), (4, 9), (5, 5)):
        given = torch.randn(rows, length, 4), torch.randn(2, 6)
        assert torch.equal(other(*given), one(*given))
    for rows, length in ((2, 3), (3, 8)):
        with pytest.raises(peftc.CaptureError, match=r"captured for inputs of which .*L\['x'\]\.size"):
            other(torch.randn(rows, length, 4), y)


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * 100


class Own(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.linear, self.how = nn.Linear(3, 3), how

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        if self.how == "function":
            return Double.apply(x)
        if self.how == "hook":
            x.register_hook(lambda gradient: gradient * 100)
        if self.how == "cond":
            return torch.cond(x.sum() > 0, lambda v: v + 1, lambda v: v - 1, (x,))
        return x


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("function", "Double has a backward of its own"),
        ("hook", r"a hook on a tensor \(register_hook\)"),
        ("cond", "graphs of its own, which one flat graph can't hold"),
    ],
)
def test_what_a_trace_would_lose_is_refused(how: str, reason: str) -> None:
    with pytest.raises(peftc.CaptureError, match=reason):
        peftc.compile(
            Own(how), peftc.LoraConfig(target_modules=["linear"]), capture="export", inputs={"x": torch.randn(2, 3)}
        )


@pytest.mark.slow
def test_a_model_that_was_cast_is_no_longer_what_was_captured() -> None:
    model = program_model("llama")
    compiled = peftc.compile(model, LINEARS, capture="export", inputs=program_inputs("llama", model))
    with pytest.raises(peftc.CaptureError, match=r"is torch.float64 now, and was captured in torch.float32"):
        compiled.double()(**program_inputs("llama", model))


def test_padding_has_no_gradient_in_a_program_either() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(6, 4, padding_idx=0)

        def forward(self, ids: Tensor) -> Tensor:
            return self.embed(ids)

    torch.manual_seed(0)
    ids = torch.tensor([[0, 1, 2], [3, 0, 0]])
    for spec in (
        peftc.LoraConfig(r=2, target_modules=["embed"]),
        peftc.TrainableTokensConfig(target_modules=["embed"], token_indices=[0, 2]),
    ):
        one, other = pair(Padded(), spec, {"ids": ids})
        require_equal_gradients(one, other, ids)


def require_equal_gradients(one: Any, other: Any, ids: Tensor) -> None:
    for model in (one, other):
        model(ids).square().sum().backward()
    found, expected = gradients(other), gradients(one)
    assert expected
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.slow
def test_trainer_trains_a_program_as_it_does_modules(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 64, (8,), generator=generator) for _ in range(8)]
    data: Any = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()} for ids in rows]
    arguments = TrainingArguments(str(tmp_path), max_steps=3, per_device_train_batch_size=2, report_to=[], use_cpu=True)
    losses: list[float] = []
    for capture in ("modules", "export"):
        model = program_model("llama")
        model.config.use_cache = False
        inputs = {**program_inputs("llama", model), "num_items_in_batch": torch.tensor(8.0)}
        torch.manual_seed(0)
        spec = peftc.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        compiled = peftc.compile(model, spec, capture=capture, inputs=inputs if capture == "export" else None)  # type: ignore[arg-type]
        losses.append(Trainer(model=compiled, args=arguments, train_dataset=data).train().training_loss)
    assert losses[0] == losses[1]


class OneRow(nn.Module):
    """A branch on a size of 1, of which a trace with another size notes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * (2 if x.shape[0] == 1 else 1)


def test_a_branch_on_one_row_is_noticed() -> None:
    program = peftc.compile(
        OneRow(), peftc.LoraConfig(target_modules=["linear"]), capture="export", inputs={"x": torch.randn(3, 4)}
    )
    program(torch.randn(2, 4))
    with pytest.raises(peftc.CaptureError, match=r"L\['x'\]\.size\(\)\[0\] != 1; capture again with inputs like these"):
        program(torch.randn(1, 4))
    again = peftc.compile(
        OneRow(), peftc.LoraConfig(target_modules=["linear"]), capture="export", inputs={"x": torch.randn(1, 4)}
    )
    model, x = OneRow(), torch.randn(1, 4)
    model.load_state_dict(again.unload().state_dict())
    again = peftc.compile(model, peftc.LoraConfig(target_modules=["linear"]), capture="export", inputs={"x": x})
    assert torch.equal(again(x), model(x))
    with pytest.raises(peftc.CaptureError, match="is of shape"):
        again(torch.randn(2, 4))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "qwen3", "bert", "t5"])
def test_autocast_at_the_call_and_at_the_capture(kind: str) -> None:
    """Casts of the trace stay, so an output's dtype may be another; its numbers are those of modules."""
    model = program_model(kind)
    inputs = program_inputs(kind, model)
    one, other = pair(model, LINEARS, inputs)
    one.eval(), other.eval()
    with torch.autocast("cpu", torch.bfloat16):
        inside = peftc.compile(model, LINEARS, capture="export", inputs=inputs).eval()
        inside.load_state_dict(one.state_dict())
        expected = one(**inputs)
        for program in (other, inside):
            found = program(**inputs)
            scale = float(expected.logits.abs().max())
            torch.testing.assert_close(found.logits.float(), expected.logits.float(), rtol=0.02, atol=0.03 * scale)
            torch.testing.assert_close(found.loss, expected.loss, rtol=1e-2, atol=0)
    torch.testing.assert_close(inside(**inputs).logits, one(**inputs).logits)
