"""Adapt a plain PyTorch ConvNet with LoRA on its convolutions and linear layers, captured as one flat graph.

The network learns six shapes, drawn dark on light, from images made on the spot. Then the camera changes: light on
dark, and turned. `capture="symbolic"` traces the network once; the adapter's operations stand in the same graph as the
network's own, and the script prints some of that code. Ten seconds on two cores, nothing is downloaded.

    python examples/convnet_symbolic.py
"""

import os
from collections.abc import Callable

# Waiting threads should sleep: by default they spin, and one other busy program makes torch ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from report import check, console, heading
from torch import Tensor, nn
from torch.nn import functional as F

import peftc

SIZE = 24
SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "disc": lambda x, y: x**2 + y**2 < 1,
    "ring": lambda x, y: (x**2 + y**2 < 1) & (x**2 + y**2 > 0.4),
    "square": lambda x, y: (x.abs() < 0.85) & (y.abs() < 0.85),
    "cross": lambda x, y: (x.abs().minimum(y.abs()) < 0.25) & (x.abs().maximum(y.abs()) < 1),
    "triangle": lambda x, y: (y < 0.8) & (y > 2 * x.abs() - 1),
    "bar": lambda x, y: (x.abs() < 0.3) & (y.abs() < 1),
}
BATCH_SIZE = 64
LORA = peftc.LoraConfig(r=8, lora_alpha=16, target_modules=["conv1", "conv2", "conv3", "hidden", "classes"])


class ShapeNet(nn.Module):
    """Three convolutions with batch norm and pooling, then two linear layers with dropout between."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.conv3, self.norm3 = nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.pool = nn.MaxPool2d(2)
        self.hidden = nn.Linear(32 * (SIZE // 8) ** 2, 64)
        self.dropout = nn.Dropout(0.2)
        self.classes = nn.Linear(64, len(SHAPES))

    def forward(self, images: Tensor) -> Tensor:
        x = self.pool(F.relu(self.norm1(self.conv1(images))))
        x = self.pool(F.relu(self.norm2(self.conv2(x))))
        x = self.pool(F.relu(self.norm3(self.conv3(x))))
        x = self.dropout(F.relu(self.hidden(x.flatten(1))))
        return self.classes(x)


def main(pretrain_epochs: int = 6, adapt_epochs: int = 8, images: int = 2048) -> None:
    """Pretrain, shift the task, adapt, merge, unmerge, unload; fail if something is not as it should be."""
    torch.manual_seed(0)
    before, before_test = draw(images, shifted=False), draw(1024, shifted=False)
    after, after_test = draw(images, shifted=True), draw(1024, shifted=True)

    heading("1. Pretrain")
    model = ShapeNet()
    fit(model, before, pretrain_epochs, learning_rate=2e-3)
    unadapted = accuracy(model, after_test)
    console.print(f"accuracy {accuracy(model, before_test):.1%}, with the new camera {unadapted:.1%}")

    heading("2. Plan and compile")
    print(peftc.plan(model, LORA, capture="symbolic"))
    compiled = peftc.compile(model, LORA, capture="symbolic")
    show_code(compiled, until="norm1")

    heading("3. Adapt to the new camera")
    compiled.print_trainable_parameters()
    fit(compiled, after, adapt_epochs, learning_rate=3e-3)
    adapted = accuracy(compiled, after_test)
    console.print(f"accuracy with the new camera {unadapted:.1%} → [bold]{adapted:.1%}[/]")

    heading("4. Merge, unmerge, unload")
    check_life(compiled, model, after_test[0])


def draw(count: int, *, shifted: bool) -> tuple[Tensor, Tensor]:
    """Noisy images of shapes of random place and size, and their classes. Shifted: light on dark, turned by 30°."""
    labels = torch.randint(len(SHAPES), (count,))
    place, size = torch.rand(2, count, 1, 1) * 8 - 4, torch.rand(count, 1, 1) * 4 + 5
    grid = torch.arange(SIZE) - (SIZE - 1) / 2
    x, y = (grid[None, None, :] - place[0]) / size, (grid[None, :, None] - place[1]) / size
    if shifted:
        angle = torch.tensor(torch.pi / 6)
        x, y = x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()
    drawn = torch.stack([shape(x, y) for shape in SHAPES.values()])[labels, torch.arange(count)].float()
    ink = drawn if shifted else 1 - drawn
    return (ink + 0.2 * torch.randn(ink.shape)).unsqueeze(1), labels


def fit(model: nn.Module, data: tuple[Tensor, Tensor], epochs: int, learning_rate: float) -> None:
    """Train whatever is trainable, dropout on.

    Batch norm updates its running statistics whenever it is in train mode, trainable or not. In a compiled model these
    belong to the base: the adapter file does not hold them, and unloading would not bring the old ones back. So the
    frozen layers stay in eval mode while an adapter learns.
    """
    images, labels = data
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and not module.weight.requires_grad:
            module.eval()
    for epoch in range(1, epochs + 1):
        losses = []
        for rows in torch.randperm(len(images)).split(BATCH_SIZE):
            loss = F.cross_entropy(model(images[rows]), labels[rows])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        if epoch in (1, epochs):
            console.print(f"epoch {epoch} of {epochs}: mean loss {sum(losses) / len(losses):.3f}")
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    return (model(data[0]).argmax(1) == data[1]).float().mean().item()


def show_code(compiled: peftc.CompiledModel, until: str) -> None:
    """The generated code up to the first call of module `until`, without the deletions torch.fx appends to lines."""
    (code,) = compiled.site_code().values()
    lines = code.splitlines()
    end = next(number for number, line in enumerate(lines) if f"self.host.{until}(" in line)
    console.print(f"\nThe flat graph has {len(lines)} lines. Those before {until}:\n")
    print("\n".join(line.partition(";")[0] for line in lines[:end]))


def check_life(compiled: peftc.CompiledModel, model: nn.Module, images: Tensor) -> None:
    """Merge, unmerge and unload. `compiled` shares tensors with `model`; a copy witnesses that none was written to."""
    witness = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        adapted, original = compiled(images), model(images)
        compiled.merge_adapter()
        merged = compiled(images)
        same = torch.equal(merged.argmax(1), adapted.argmax(1))
        check(same, f"merged: same predictions, logits within {(merged - adapted).abs().max():.1e}")
        compiled.unmerge_adapter()
        check(torch.equal(compiled(images), adapted), "unmerged: same logits as before, bit for bit")
        plain = compiled.unload()
        check(type(plain) is type(model), f"unloaded: a {type(plain).__name__} again")
        check(torch.equal(plain(images), original), "unloaded: same logits as the original, bit for bit")
    for which, state in (("unloaded", plain.state_dict()), ("original", model.state_dict())):
        untouched = state.keys() == witness.keys() and all(torch.equal(state[name], witness[name]) for name in witness)
        check(untouched, f"{which}: all {len(witness)} tensors untouched, running statistics included")


if __name__ == "__main__":
    main()
