"""Memory for many tensors at once."""

import torch

from peftc.memory import Room


def test_stacks_in_a_room_are_what_torch_stacks_and_do_not_touch_each_other() -> None:
    room, generator = Room(), torch.Generator().manual_seed(0)
    shapes = [
        (3, 5),
        (700, 900),
        (1,),
        (2500, 900),
        (17, 3),
    ]  # The fourth is larger than a piece, the third ends oddly.
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.float32]
    lists = [
        [torch.randn(shape, generator=generator).to(dtype) for _ in range(5)]
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]
    with torch.inference_mode():
        made = [room.stack([tensor.mT if tensor.dim() > 1 else tensor for tensor in tensors]) for tensors in lists]
    for own, tensors in zip(made, lists, strict=True):
        expected = torch.stack([tensor.mT if tensor.dim() > 1 else tensor for tensor in tensors])
        assert torch.equal(own, expected)
        assert own.dtype is expected.dtype
        own.mul_(1)  # Not an inference tensor, which could not be written to here.
