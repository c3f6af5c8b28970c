"""Does a pipeline axis earn its place for Kimi K2? Bytes on the slow network against compute, and memory, by layout.

python benchmarks/pipeline_arithmetic.py prints the tables of docs/pipeline.md: arithmetic, nothing is measured. A step
has 67.1M tokens in sequences of 4,096. Compute is at 40 % of the peak, networks at their full rate, so a share of 1
means that the network is busy for as long as the devices are, and all of it would have to be hidden.

No stages ("fsdp"): a microbatch gathers the weights twice (bf16, forward and backward) and scatters the gradients once
(bf16), over the network where fsdp leaves the fast domain. Stages ("pp"): weights stay where they are used, gradients
are scattered (float32) and weights gathered once a step, and activations pass from stage to stage.
"""

from typing import NamedTuple

from k2jax.config import ModelConfig
from k2jax.model.flops import count_parameters, flops_per_token
from k2jax.model.transformer import declarations
from k2jax.train.state import weight_leaves

MODEL, SEQUENCE, STEP_TOKENS, MFU = ModelConfig(), 4096, 2**26, 0.4
WEIGHTS = weight_leaves(declarations(MODEL))
EXPERTS = sum(w.size for w in WEIGHTS if "E" in w.stack)
OTHERS = sum(w.size for w in WEIGHTS if "E" not in w.stack)
MOE_LAYERS = MODEL.num_hidden_layers - MODEL.first_k_dense_replace
ROW = 2 * MODEL.hidden_size  # bytes of one token's activation in bfloat16
STATE = 8  # bytes a parameter: float32 master and momentum, cut over all devices


class Hardware(NamedTuple):
    """Rates of one device, each way."""

    name: str
    peak: float  # FLOP/s, bf16
    network: float  # bytes/s out of the domain
    domain: int  # devices that the fast network connects
    memory: float  # GiB


class Layout(NamedTuple):
    expert: int
    stage: int  # 1: none
    tokens: int  # of a microbatch, on one device (with stages: on the devices of one stage, divided by `expert`)
    virtual: int = 1  # stages that a device has


class Cost(NamedTuple):
    """Seconds a step on one device, GiB, and the share of a step that a pipeline's devices wait."""

    compute: float
    weights: float
    exchange: float
    between_stages: float
    bubble: float
    resident: float
    activations: float

    @property
    def network_share(self) -> float:
        return (self.weights + self.exchange + self.between_stages) / self.compute


# 400 Gb/s a GPU; v5p: a torus of three axes at 9e10 bytes/s each way and direction (docs/pipeline.md)
H100 = Hardware("H100 (H800 has the same network)", 989e12, 50e9, 8, 80)
GB200 = Hardware("GB200 NVL72", 2500e12, 50e9, 64, 186)
V5P = Hardware("TPU v5p", 459e12, 5.4e11, 1, 95)


def domains_reached(expert: int, domain: int) -> float:
    """Domains besides its own that a token's experts lie in, on average; its row is sent once to each."""
    count = max(expert // domain, 1)
    return (count - 1) * (1 - (1 - 1 / count) ** MODEL.num_experts_per_tok)


def cost(hardware: Hardware, devices: int, layout: Layout) -> Cost:
    """Of one step on `devices`."""
    expert, stage = layout.expert, layout.stage
    per_device = STEP_TOKENS / devices
    held = (EXPERTS / expert + OTHERS) / stage  # parameters that a device multiplies by
    compute = per_device * flops_per_token(WEIGHTS, MODEL, SEQUENCE) / (hardware.peak * MFU)
    microbatches = per_device * stage / layout.tokens
    # dispatch and combine, forwards and backwards; the layers of a stage for all tokens that pass through it
    exchange = 4 * per_device * MOE_LAYERS * domains_reached(expert, hardware.domain) * ROW
    if stage == 1:
        traffic, between, bubble, resident = held * 6 * max(microbatches, 1), 0.0, 0.0, 0.0
        kept = per_device / microbatches * MODEL.num_hidden_layers
    else:
        traffic, resident = held * 6, held * 6  # bf16 weights and fp32 gradients, held and moved once a step
        between = 2 * per_device * stage * layout.virtual * ROW
        bubble = (stage - 1) / (layout.virtual * microbatches + stage - 1)
        # interleaved 1F1B: the first stage holds the inputs of this many microbatches of a virtual stage's layers
        in_flight = stage * (1 + (stage - 1) / (stage * layout.virtual)) if layout.virtual > 1 else stage
        kept = layout.tokens * in_flight * MODEL.num_hidden_layers / stage
    held_state = STATE * (EXPERTS + OTHERS) / devices
    return Cost(
        compute, traffic / hardware.network, exchange / hardware.network, between / hardware.network, bubble,
        (resident + held_state) / 2**30, kept * ROW / 2**30,
    )  # fmt: skip


def table(hardware: Hardware, devices: int, layouts: list[Layout]) -> None:
    print(f"\n{devices:,} {hardware.name}, {STEP_TOKENS // devices:,} tokens a device and step\n")
    print("| layout | tokens at once | compute s | weights s | exchange s | stages s | network / compute | bubble "
          "| state + weights GiB | layer inputs GiB |\n|" + "---|" * 10)  # fmt: skip
    for layout in layouts:
        of = cost(hardware, devices, layout)
        stages = f"pp{layout.stage} v{layout.virtual}" if layout.stage > 1 else "fsdp"
        print(
            f"| {stages} ep{layout.expert} | {layout.tokens:,} | {of.compute:.1f} | {of.weights:.1f} "
            f"| {of.exchange:.1f} | {of.between_stages:.1f} | {of.network_share:.2f} | {of.bubble:.1%} "
            f"| {of.resident:.0f} | {of.activations:.0f} |"
        )


def main() -> None:
    total = sum(size for size, _ in count_parameters(WEIGHTS, MODEL).values())
    print(f"{total:,} parameters, {EXPERTS:,} of them experts'")
    gpu = [Layout(8, 1, 32_768), Layout(8, 1, 8_192), Layout(64, 1, 32_768), Layout(64, 1, 8_192)]
    pipeline = [Layout(16, 16, 4_096, v) for v in (1, 2, 4)]
    table(H100, 2048, [*gpu, *pipeline])
    table(H100, 256, [Layout(8, 1, 32_768), Layout(64, 1, 32_768), Layout(16, 16, 4_096, 2)])
    table(GB200, 1024, [Layout(64, 1, 65_536), Layout(64, 1, 16_384), Layout(64, 4, 4_096, 4)])
    table(V5P, 1024, [Layout(1, 1, 65_536), Layout(1, 1, 16_384)])
    table(V5P, 4096, [Layout(1, 1, 16_384)])


if __name__ == "__main__":
    main()
