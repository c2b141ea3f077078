"""Hosts: classes that others exchange, tensors that others exchange, code that names no adapter, threads."""

import copy
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftc
from tests.support.models import Everything, tiny, token_ids


class Small(nn.Module):
    """An embedding and two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.a, self.b = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(self.embed(ids))))


IDS = torch.arange(8).view(2, 4)


def moved(compiled: Any) -> Any:
    """The adapters as if they had been trained."""
    with torch.no_grad():
        for name in compiled.peft_config:
            for tensor in compiled.adapter_state_dict(name).values():
                tensor.add_(0.3 * torch.randn_like(tensor))
    return compiled


def spec(method: str, **fields: Any) -> peftc.AdapterSpec:
    if method == "ia3":
        return peftc.IA3Config(target_modules=["a", "b"], feedforward_modules=["b"])
    return peftc.LoraConfig(**{"r": 2, "target_modules": ["a", "b"] if method == "lora" else ["embed", "a"], **fields})


def counted(compiled: peftc.CompiledModel) -> tuple[Any, list[int]]:
    """The base under torch.compile(fullgraph=True), and a list that has an entry for every graph that was made."""
    graphs: list[int] = []

    def count(graph: torch.fx.GraphModule, example: Any) -> Any:
        graphs.append(1)
        return graph.forward

    return torch.compile(compiled.base, backend=count, fullgraph=True), graphs


class TestCompiled:
    """Under torch.compile(fullgraph=True) a swap is no new graph, whatever the adapter is called."""

    @pytest.mark.parametrize("method", ["lora", "embedding", "ia3"])
    def test_twelve_adapters_of_one_shape_are_one_graph_and_none_is_another(self, method: str) -> None:
        torch.compiler.reset()
        compiled = moved(peftc.compile(Small().eval(), {f"n{i}": spec(method) for i in range(12)}))
        fast, graphs = counted(compiled)
        for name in compiled.peft_config:
            compiled.set_adapter(name)
            torch.testing.assert_close(fast(IDS), compiled(IDS))
        assert len(graphs) == 1
        compiled.set_adapter([])
        torch.testing.assert_close(fast(IDS), compiled(IDS))
        assert len(graphs) == 2
        for name in ("n3", "n11"):
            compiled.set_adapter(name)
            torch.testing.assert_close(fast(IDS), compiled(IDS))
        assert len(graphs) == 2

    def test_other_scalings_are_one_graph_more_at_most(self) -> None:
        torch.compiler.reset()
        specs = {f"n{i}": spec("lora", lora_alpha=i + 1) for i in range(12)}
        compiled = moved(peftc.compile(Small().eval(), specs))
        fast, graphs = counted(compiled)
        for name in compiled.peft_config:
            compiled.set_adapter(name)
            torch.testing.assert_close(fast(IDS), compiled(IDS))
        assert len(graphs) <= 2

    def test_the_code_of_a_host_names_no_adapter(self) -> None:
        one = peftc.compile(Everything(), {"first": peftc.LoraConfig(target_modules="all-linear", lora_dropout=0.1)})
        two = peftc.compile(Everything(), {"second": peftc.LoraConfig(target_modules="all-linear", lora_dropout=0.1)})
        assert one.site_code() == two.site_code()
        assert not any(name in code for code in one.site_code().values() for name in ("first", "second", "default"))

    def test_experts_are_adapted_inside_of_a_compiled_model(self) -> None:
        torch.compiler.reset()

        class Experts(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.w = nn.Parameter(torch.randn(3, 4, 4))

            def forward(self, x: Tensor) -> Tensor:
                return torch.einsum("bi,eoi->beo", x, self.w)

        model = nn.Sequential(Experts())
        compiled = moved(peftc.compile(model, peftc.LoraConfig(r=1, target_parameters=["w"])))
        x = torch.randn(2, 4)
        fast = torch.compile(compiled.base, backend="eager", fullgraph=True)
        torch.testing.assert_close(fast(x), compiled(x))
        assert not torch.allclose(fast(x), model(x))


@pytest.mark.parametrize("method", ["lora", "embedding", "ia3"])
class TestExchanged:
    """Others exchange parameters on the modules that own them; what runs reads the new ones."""

    def test_loading_with_assign(self, method: str) -> None:
        one, two = (moved(peftc.compile(Small(), spec(method))) for _ in range(2))
        two.load_state_dict(one.state_dict(), assign=True)
        assert torch.equal(two(IDS), one(IDS))
        two.set_adapter([])
        two.set_adapter("default")
        assert torch.equal(two(IDS), one(IDS))

    def test_functional_call(self, method: str) -> None:
        one, two = (moved(peftc.compile(Small(), spec(method))) for _ in range(2))
        y = two(IDS)
        tensors = {**dict(one.named_parameters()), **dict(one.named_buffers())}
        assert torch.equal(torch.func.functional_call(two, tensors, (IDS,)), one(IDS))
        assert torch.equal(two(IDS), y)

    def test_to_empty_and_loading(self, method: str) -> None:
        one, two = (moved(peftc.compile(Small(), spec(method))) for _ in range(2))
        two.to("meta").to_empty(device="cpu")
        two.load_state_dict(one.state_dict())
        assert torch.equal(two(IDS), one(IDS))

    def test_another_dtype(self, method: str) -> None:
        compiled = moved(peftc.compile(Small(), spec(method)))
        y = compiled(IDS)
        torch.testing.assert_close(compiled.double()(IDS), y.double(), rtol=1e-4, atol=1e-5)

    def test_deepcopy_and_an_optimiser(self, method: str) -> None:
        compiled = peftc.compile(Small(), spec(method, **({"init_lora_weights": False} if method != "ia3" else {})))
        other = copy.deepcopy(compiled)
        optimiser = torch.optim.SGD([p for p in other.parameters() if p.requires_grad], lr=0.5)
        other(IDS).square().sum().backward()
        before = compiled(IDS)
        optimiser.step()
        assert not torch.allclose(other(IDS), before)
        assert torch.equal(compiled(IDS), before)

    def test_names_are_those_of_peft(self, method: str) -> None:
        compiled = peftc.compile(Small(), spec(method), "x")
        names = {name for name, p in compiled.base.named_parameters() if p.requires_grad}
        expected = {
            "lora": {f"{s}.lora_{ab}.x.weight" for s in "ab" for ab in "AB"},
            "embedding": {f"embed.lora_embedding_{ab}.x" for ab in "AB"} | {f"a.lora_{ab}.x.weight" for ab in "AB"},
            "ia3": {"a.ia3_l.x", "b.ia3_l.x"},
        }
        assert names == expected[method]


def test_a_host_keeps_its_own_attributes_and_methods() -> None:
    class Odd(nn.Linear):
        def __init__(self) -> None:
            super().__init__(6, 6)
            self.graph = "mine"
            self.code = 3

        def extra(self) -> str:
            return f"{self.graph}{self.code}"

    model = Small()
    model.a = Odd()
    compiled = peftc.compile(model, spec("lora"))
    assert compiled.base.a.extra() == "mine3"
    assert compiled.base.a.graph == "mine"
    assert isinstance(compiled.base.a, Odd)
    assert compiled.graph_of("a").nodes
    with pytest.raises(peftc.AdapterError, match="runs no rewritten graph now"):
        compiled.graph_of("embed")


def test_a_graph_taken_off_a_host_is_its_own() -> None:
    compiled = moved(peftc.compile(Small(), spec("lora")))
    y, graph = compiled(IDS), compiled.graph_of("a")
    for node in list(graph.nodes):
        if node.name.startswith("linear_with_products"):
            node.replace_all_uses_with(node.args[0])
    assert torch.equal(compiled(IDS), y)
    assert str(graph) != str(compiled.graph_of("a"))


def test_threads_with_adapted_experts_do_not_meet() -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    lora = peftc.LoraConfig(target_modules=["q_proj"], target_parameters=targets)
    compiled = moved(peftc.compile(Qwen3MoeForCausalLM(config).eval(), lora))
    ids = token_ids(8, 6, 64)
    with torch.no_grad():
        expected = compiled(ids).logits
    wrong: list[float] = []

    def run() -> None:
        for _ in range(20):
            with torch.no_grad():
                difference = float((compiled(ids).logits - expected).abs().max())
            wrong.extend([difference] if difference > 1e-5 else [])

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_weight_that_stands_in_is_seen_in_the_call_and_nowhere_else() -> None:
    class Router(nn.Linear):
        """No linear map, and what torch.fx can't trace."""

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = super().forward(x)
            if float(y.abs().max()) > 1e9:
                y = y.clamp(-1e9, 1e9)
            return y.softmax(-1), self.weight

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = Router(6, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.router(x)

    model, x = Model(), torch.randn(3, 6)
    compiled = moved(peftc.compile(model, peftc.LoraConfig(target_modules=["router"], r=2)))
    edit = compiled.plan.edits[0]
    assert (edit.slots, edit.opaque, edit.unmergeable) == (("weight",), True, None)
    assert "is adapted as a weight" in str(compiled.plan)
    probabilities, seen = compiled(x)
    router = compiled.base.router
    assert router.weight is router._parameters["weight"]
    assert torch.equal(router.weight, model.router.weight)
    assert not torch.equal(seen, router.weight)
    probabilities.square().sum().backward()
    assert all(p.grad is not None for p in compiled.parameters() if p.requires_grad)
    compiled.merge_adapter()
    torch.testing.assert_close(compiled(x)[0], probabilities)
    torch.testing.assert_close(router.weight.detach(), seen.detach())


def replica_of(model: nn.Module) -> nn.Module:
    """What torch.nn.parallel.replicate makes of a model for one device, without the device: parameters become tensors."""
    modules = list(model.modules())
    copies = {id(module): module._replicate_for_data_parallel() for module in modules}
    for module in modules:
        replica = copies[id(module)]
        for name, child in module._modules.items():
            setattr(replica, name, None if child is None else copies[id(child)])
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter.detach() * 2)
        for name, buffer in module._buffers.items():
            replica._buffers[name] = buffer
    return copies[id(model)]


@pytest.mark.parametrize("method", ["lora", "embedding", "ia3", "saved", "weight"])
def test_replicas_of_data_parallel_run_on_their_own_tensors(method: str) -> None:
    """A replica whose tensors are twice the model's gives what a model with such tensors gives."""

    class Odd(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if float(x.abs().max()) < 1e9 else x

    model = Small()
    if method == "weight":
        model.b = Odd(6, 5)
    made = {
        "saved": peftc.LoraConfig(r=2, target_modules=["a"], modules_to_save=["b"]),
        "weight": peftc.LoraConfig(r=2, target_modules=["a", "b"]),
    }
    compiled = moved(peftc.compile(model, made.get(method) or spec(method, lora_dropout=0.0)))
    y, replica = compiled(IDS), replica_of(compiled.base)
    doubled = copy.deepcopy(compiled)
    with torch.no_grad():
        for parameter in doubled.parameters():
            parameter.mul_(2)
    for _ in range(2):
        torch.testing.assert_close(replica(IDS), doubled(IDS))
    assert torch.equal(compiled(IDS), y)
    compiled.set_adapter([])
    torch.testing.assert_close(replica_of(compiled.base)(IDS), doubled.unload()(IDS))


@pytest.mark.parametrize("method", ["PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig"])
@pytest.mark.parametrize("task", ["SEQ_2_SEQ_LM", "CAUSAL_LM"])
def test_replicas_with_virtual_tokens(method: str, task: str) -> None:
    model = tiny("t5" if task == "SEQ_2_SEQ_LM" else "llama")
    spec = getattr(peftc, method)(task_type=task, num_virtual_tokens=3)
    compiled = moved(peftc.compile(model, spec)).eval()
    doubled = copy.deepcopy(compiled)
    with torch.no_grad():
        for parameter in doubled.parameters():
            parameter.mul_(2)
    given = {"input_ids": IDS, **({"decoder_input_ids": IDS} if task == "SEQ_2_SEQ_LM" else {})}
    expected = doubled(**given).logits
    torch.testing.assert_close(replica_of(compiled.base)(**given).logits, expected)
    assert not torch.allclose(compiled(**given).logits, expected)


def test_a_saved_sequence_runs_its_own_modules_only(tmp_path: Path) -> None:
    """The trained copy is a child of the sequence, which runs its children."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.classifier = nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.classifier(self.a(x))

    model, x = Model(), torch.randn(3, 6)
    compiled = peftc.compile(model, peftc.LoraConfig(target_modules=["a"], modules_to_save=["classifier"]))
    assert torch.equal(compiled(x), model(x))
    y = moved(compiled)(x)
    with compiled.disable_adapter():
        assert torch.equal(compiled(x), model(x))
        assert len(compiled.base.classifier) == 3
        assert compiled.base.classifier[-1] is compiled.base.classifier._modules["2"]
        assert [type(module) for module in compiled.base.classifier[:-1]] == [nn.Linear, nn.ReLU]
        torch.testing.assert_close(compiled.base.classifier[1:](x), model.classifier[1:](x))
    with compiled.merged():
        torch.testing.assert_close(compiled(x), y)
    compiled.save_pretrained(tmp_path)
    assert torch.equal(peftc.load(model, tmp_path)(x), y)
    compiled.add_adapter("b", peftc.LoraConfig(target_modules=["a"], modules_to_save=["classifier"]))
    compiled.set_adapter("b")
    assert torch.equal(compiled(x), model(x))
    assert [type(module) for module in compiled.unload().classifier] == [nn.Linear, nn.ReLU, nn.Linear]


class Block(nn.ModuleDict):
    """A dict of layers that its forward runs in turn."""

    def forward(self, x: Tensor) -> Tensor:
        for _, layer in self.items():
            x = torch.tanh(layer(x))
        return x


def test_a_saved_dict_of_layers_runs_its_own_layers_only() -> None:
    model = nn.Sequential(nn.Linear(6, 6), Block({"one": nn.Linear(6, 6), "two": nn.Linear(6, 6)}))
    compiled = moved(peftc.compile(model, peftc.LoraConfig(target_modules=["0"], modules_to_save=["1"])))
    x = torch.randn(3, 6)
    assert not torch.equal(compiled(x), model(x))
    with compiled.disable_adapter():
        assert torch.equal(compiled(x), model(x))
        block = compiled.base[1]
        assert [*block] == [*block.keys()] == ["one", "two"]
        assert len(block) == len(block.values()) == 2


WALKS: dict[str, Callable[[nn.Module], Iterable[nn.Module]]] = {
    "children": lambda block: block.children(),
    "named_children": lambda block: [child for _, child in block.named_children()],
    "_modules": lambda block: block._modules.values(),
    "modules": lambda block: [module for module in block.modules() if type(module) is nn.Linear],
}


class Walker(nn.Module):
    """Runs whatever children it has, in turn, and computes with a weight of its own."""

    def __init__(self, walk: str) -> None:
        super().__init__()
        self.walk, self.weight = walk, nn.Parameter(torch.randn(6, 6))
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        for child in WALKS[self.walk](self):
            x = torch.tanh(child(x))
        return x @ self.weight.T


@pytest.mark.parametrize("walk", WALKS)
@pytest.mark.parametrize("how", [{"modules_to_save": ["1"]}, {"target_parameters": ["1.weight"]}])
def test_a_forward_that_walks_its_children_meets_its_own_only(walk: str, how: dict[str, Any]) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, x = nn.Sequential(nn.Linear(6, 6), Walker(walk)), torch.randn(3, 6)
    compiled = peftc.compile(model, peftc.LoraConfig(target_modules=["0"], **how))
    assert torch.equal(compiled(x), model(x))
    y = moved(compiled)(x)
    assert not torch.allclose(y, model(x))
    with compiled.disable_adapter():
        assert torch.equal(compiled(x), model(x))
        assert torch.equal(torch.compile(compiled, fullgraph=True, backend="eager")(x), model(x))
    torch.testing.assert_close(torch.compile(compiled, fullgraph=True, backend="eager")(x), y)
    torch.testing.assert_close(torch.nn.DataParallel(compiled, [0] if torch.cuda.is_available() else None)(x), y)
    assert len(list(compiled.base[1].children())) == 3
    with compiled.merged():
        torch.testing.assert_close(compiled(x), y)
    torch.testing.assert_close(copy.deepcopy(compiled)(x), y)
    assert [name for name, _ in compiled.unload()[1].named_children()] == ["one", "two"]


def test_a_saved_list_which_nobody_calls_is_refused() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.layers = nn.Linear(6, 6), nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return self.a(x)

    with pytest.raises(peftc.CaptureError, match=r"ModuleList, which is never called.*\['layers.0', 'layers.1'\]"):
        peftc.compile(Model(), peftc.LoraConfig(target_modules=["a"], modules_to_save=["layers"]))
    advised = peftc.LoraConfig(target_modules=["a"], modules_to_save=["layers.0", "layers.1"])
    compiled, x = peftc.compile(Model(), advised), torch.randn(3, 6)
    before = compiled(x)
    y = moved(compiled)(x)
    assert not torch.allclose(before, y)
    torch.testing.assert_close(compiled.merge_and_unload()(x), y)


@pytest.mark.parametrize("inplace", [False, True])
def test_what_holds_hosts_of_another_model_is_refused(inplace: bool) -> None:
    """Its adapters would count as the base's weights here, and end with this model."""
    model, other = Small(), peftc.LoraConfig(target_modules=["b"])
    compiled = moved(peftc.compile(model, peftc.LoraConfig(target_modules=["a"]), inplace=True))
    y = compiled(IDS)
    with pytest.raises(peftc.AdapterError, match="a: is part of a model that was compiled already"):
        peftc.compile(model, other, inplace=inplace)
    assert torch.equal(compiled(IDS), y)
    compiled.unload()
    peftc.compile(model, other, inplace=inplace)


def test_unloading_leaves_the_hosts_of_a_model_inside() -> None:
    inner, model = Small(), nn.Sequential()
    outer = peftc.compile(model.append(inner), peftc.LoraConfig(target_modules=["0.a"]), inplace=True)
    part = peftc.compile(inner.b, peftc.LoraConfig(target_modules="all-linear"), inplace=True)
    moved(part)
    x = torch.randn(2, 6)
    y = part(x)
    outer.unload()
    assert torch.equal(part(x), y)


def _sharded(rank: int, world: int, order: str, folder: str) -> None:
    """What a process of the mesh checks. It raises, and so fails the test, if anything is wrong."""
    from torch import distributed
    from torch.distributed.fsdp import FSDPModule, fully_shard

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}.group", rank=rank, world_size=world)
    mesh = distributed.init_device_mesh("cpu", (world,))
    ids = torch.arange(3, 11).view(2, 4)
    torch.manual_seed(0)
    model = tiny("llama").eval()
    specs = {
        "a": peftc.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"]),
        "b": peftc.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    }
    torch.manual_seed(1)
    plain = moved(peftc.compile(copy.deepcopy(model), specs))
    expected: dict[str, Tensor] = {}
    states = {name: {k: v.detach().clone() for k, v in plain.adapter_state_dict(name).items()} for name in "ab"}
    with torch.no_grad():
        for name in "ab":
            plain.set_adapter(name)
            expected[name] = plain(ids).logits
        expected["none"] = model(ids).logits
    plain.set_adapter("a")

    def shard(base: Any) -> None:
        for layer in base.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(base, mesh=mesh)

    if order == "after":
        compiled = plain
        shard(compiled.base)
    else:
        shard(model)
        compiled = peftc.compile(model, specs, inplace=True)
        for name in "ab":
            peftc.set_peft_model_state_dict(compiled, states[name], name)
        compiled.eval()
    layer = compiled.base.model.layers[0]
    cls = type(layer)

    def check(name: str, near: float = 1e-6) -> None:
        with torch.no_grad():
            assert float((compiled(ids).logits - expected[name]).abs().max()) <= near, name
        assert type(layer) is cls
        assert isinstance(layer, FSDPModule)

    check("a")
    compiled.set_adapter("b")
    check("b")
    with compiled.disable_adapter():
        check("none")
    compiled.set_adapter("a")
    before = {name: own(p).clone() for name, p in compiled.base.named_parameters()}
    compiled.merge_adapter()
    check("a", 1e-5)
    compiled.unmerge_adapter()
    for name, parameter in compiled.base.named_parameters():
        assert torch.equal(own(parameter), before[name]), name
    check("a")
    compiled.save_pretrained(folder, is_main_process=rank == 0, selected_adapters=["a"])
    for name in "ab":
        found = peftc.get_peft_model_state_dict(compiled, adapter_name=name)
        assert all(type(value) is Tensor for value in found.values())
        assert all(torch.equal(value, states[name][key]) for key, value in found.items())
    compiled.set_adapter("b")
    compiled(ids).logits.square().mean().backward()
    wanted = [p for p in compiled.parameters() if p.requires_grad]
    assert wanted
    assert all(p.grad is not None for p in wanted)
    base = compiled.unload()
    assert type(layer) is cls or not isinstance(layer, peftc.CompiledModel)
    with torch.no_grad():
        assert torch.allclose(base(ids).logits, expected["none"], atol=1e-6)
    distributed.destroy_process_group()


def own(tensor: Any) -> Tensor:
    return tensor.detach().to_local() if hasattr(tensor, "to_local") else tensor.detach()


@pytest.mark.parametrize("order", [pytest.param("after", marks=pytest.mark.slow), "before"])
@pytest.mark.parametrize("world", [1, 2])
def test_fully_sharded_models_switch_merge_save_and_unload(world: int, order: str, tmp_path: Path) -> None:
    """FSDP2 exchanges classes and parameters, before compiling or after; nothing is lost and nothing is another model."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Their server imports once what they all need.
    torch.multiprocessing.set_forkserver_preload([__name__, "torch.distributed.fsdp", "transformers.models.llama"])
    processes: Any = torch.multiprocessing.start_processes
    processes(_sharded, args=(world, order, str(tmp_path)), nprocs=world, start_method="forkserver")
    torch.manual_seed(0)
    model = tiny("llama").eval()
    loaded = peftc.load(model, tmp_path, "a", subfolder="a")
    assert not torch.equal(loaded(torch.arange(3, 11).view(2, 4)).logits, model(torch.arange(3, 11).view(2, 4)).logits)
