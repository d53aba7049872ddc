"""
Tapes that look like training a transformer: loading, then steps of forward, backward and optimizer.

Not a plan of any real model: sizes and lifetimes are of the kind that one has, so that the allocator meets
what it meets in practice. Everything is a function of its arguments.
"""

from __future__ import annotations

from memplan.tape.tape import Mark, Tape


class _Writer:
    def __init__(self) -> None:
        self.tape = Tape(events=[], sizes=[0], marks=[])

    def mark(self, phase: str, step: int) -> None:
        self.tape.marks.append(Mark(event=len(self.tape.events), phase=phase, step=step))

    def new(self, num_bytes: int, stream: int = 0) -> int:
        storage = len(self.tape.sizes)
        self.tape.sizes.append(num_bytes)
        self.tape.events.append(storage)
        if stream:
            self.tape.streams[storage] = stream
        return storage

    def free(self, *storages: int) -> None:
        self.tape.events.extend(-storage for storage in storages)


def transformer_tape(
    *,
    num_layers: int = 4,
    hidden_size: int = 1024,
    steps: tuple[int, ...] = (2048, 2048),
    vocab_size: int = 32000,
    checkpointing: bool = False,
    lora_rank: int = 0,
    foreach: bool = False,
    sharded: bool = False,
) -> Tape:
    """
    A tape of one step for each number of tokens in `steps`, in bf16.

    Args:
        checkpointing: keep only what enters each layer, and run the layer again in backward.
        lora_rank: 0 to train everything, else train float32 adapters of this rank beside frozen weights.
        foreach: an optimizer step with temporaries as large as everything that is trained.
        sharded: gather each layer's weights on stream 1 before it runs, and reduce its gradients on stream 2.
    """
    writer = _Writer()
    new, free = writer.new, writer.free
    intermediate = hidden_size * 7 // 2
    widths = [(hidden_size, hidden_size)] * 2 + [(hidden_size, hidden_size // 4)] * 2
    widths += [(hidden_size, intermediate)] * 2 + [(intermediate, hidden_size)]
    ranks = 8 if sharded else 1
    weights = [2 * fan_in * fan_out for fan_in, fan_out in widths]
    trained = [4 * lora_rank * (fan_in + fan_out) for fan_in, fan_out in widths] if lora_rank else weights

    tokens = 0

    def activation(width: int, itemsize: int = 2) -> int:
        return new(tokens * width * itemsize)

    def layer(entering: int) -> tuple[int, list[int]]:
        """(what leaves the layer, what is kept for backward)"""
        gathered = [new(size, 1) for size in weights] if sharded else []
        kept = [new(tokens * 4), activation(hidden_size)]
        for fan_in, fan_out in widths:
            if lora_rank:
                kept += [activation(fan_in, 4), activation(lora_rank, 4)]
                update = activation(fan_out, 4)
                output = activation(fan_out)
                free(update)
            else:
                output = activation(fan_out)
            kept.append(output)
        attention = [activation(hidden_size), new(tokens * hidden_size // 32)]
        leaving = activation(hidden_size)
        free(*gathered)
        return leaving, [*kept, *attention]

    writer.mark("load", 0)
    for size in [2 * vocab_size * hidden_size, *weights * num_layers, 2 * vocab_size * hidden_size]:
        new(size // ranks)
    if lora_rank:
        for size in trained * num_layers:
            new(size)
    states: list[int] = []
    for step, tokens in enumerate(steps, start=1):
        writer.mark("forward", step)
        inputs = [new(tokens * 8), new(tokens * 8)]
        hidden = activation(hidden_size)
        entering, kept = [], []
        for _ in range(num_layers):
            entering.append(hidden)
            hidden, saved = layer(hidden)
            if checkpointing:
                free(*saved)
                saved = []
            kept.append(saved)
        logits = activation(vocab_size)
        upcast = activation(vocab_size, 4)
        loss = new(4)
        writer.mark("backward", step)
        gradient_of_logits = activation(vocab_size, 4)
        free(upcast)
        cast = activation(vocab_size)
        free(gradient_of_logits, logits)
        gradient = activation(hidden_size)
        free(cast, hidden)
        gradients = []
        for saved, entered in zip(reversed(kept), reversed(entering)):
            if checkpointing:
                leaving, saved = layer(entered)
                free(leaving)
            gathered = [new(size, 1) for size in weights] if sharded else []
            for (fan_in, _), size in zip(reversed(widths), reversed(trained)):
                wide = activation(fan_in, 4 if lora_rank else 2)
                whole = new(size, 2 if sharded else 0)
                if sharded:
                    gradients.append(new(size // ranks))
                    free(whole)
                else:
                    gradients.append(whole)
                free(wide)
            free(*gathered)
            passed = activation(hidden_size)
            free(gradient, *saved, entered)
            gradient = passed
        free(gradient)
        writer.mark("optimizer_step", step)
        if not states:
            for storage in gradients:
                states += [new(512), new(writer.tape.sizes[storage]), new(writer.tape.sizes[storage])]
        if foreach:
            free(*[new(writer.tape.sizes[storage]) for storage in gradients])
        free(*gradients, loss, *inputs)
    return writer.tape
