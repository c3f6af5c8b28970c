"""Does a pipeline axis earn its place for Kimi K2? Bytes on the slow network against compute, and memory, by layout.

python benchmarks/pipeline_arithmetic.py prints the tables of docs/pipeline.md: arithmetic, nothing is measured. A step
has some 67.1M tokens in sequences of 4,096. Compute is at 40 % of the peak, networks at their full rate, so a share of
1 means that the network is busy for as long as the devices are, and all of it would have to be hidden.

No stages: a microbatch gathers the weights twice (bf16, forward and backward) and scatters the gradients once (bf16),
over the network where fsdp leaves the fast domain. Stages, as built (model/pipeline.py): the layers' weights are
gathered (bf16) and their gradients scattered (float32) once a pass, embedding and head as well (float32), and rows pass
from stage to stage. Both make the forward pass of every layer a second time: without stages layer by layer (remat
"layer"), with them a stage's layers at once, all of whose activations are then there of one microbatch (remat "none").
"""

from typing import NamedTuple

from k2jax.config import ModelConfig
from k2jax.model.flops import count_parameters, flops_per_token
from k2jax.model.transformer import declarations
from k2jax.model.weights import weight_leaves

MODEL, SEQUENCE, STEP_TOKENS, MFU = ModelConfig(), 4096, 2**26, 0.4
WEIGHTS = weight_leaves(declarations(MODEL))
EXPERTS = sum(w.size for w in WEIGHTS if "E" in w.stack)
TABLES = sum(w.size for w in WEIGHTS if w.component in ("embedding", "head"))
OTHERS = sum(w.size for w in WEIGHTS if "E" not in w.stack)
DENSE_LAYERS = sum(w.size for w in WEIGHTS if "L" in w.stack and w.first_layer < MODEL.first_k_dense_replace)
MOE_LAYERS = MODEL.num_hidden_layers - MODEL.first_k_dense_replace
ROW = 2 * MODEL.hidden_size  # bytes of one token's activation in bfloat16
STATE = 8  # bytes a parameter: float32 master and momentum, cut over all devices
EXCHANGES = 6  # of a layer's rows: out and back, in the forward pass, made again, and backwards
OWN_ROWS = 4  # of each token beside the stages' inputs: embedding, the stream, and both gradients


class Hardware(NamedTuple):
    """Rates of one device, each way."""

    name: str
    peak: float  # FLOP/s, bf16
    network: float  # bytes/s out of the domain
    domain: int  # devices that the fast network connects
    memory: float  # GiB


class Layout(NamedTuple):
    expert: int
    fsdp: int
    stage: int = 1
    tokens: int = SEQUENCE  # of a microbatch, on one device
    passes: int = 1  # in which the microbatches go through the stages

    @property
    def devices(self) -> int:
        return self.expert * self.fsdp * self.stage

    @property
    def microbatches(self) -> int:
        """Of a step: as many in each pass, a multiple of the stages."""
        whole, least = STEP_TOKENS // (self.expert * self.fsdp * self.tokens), self.stage * self.passes
        return max(whole // least, 1) * least


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


def layer_bytes() -> int:
    """About what the backward pass of an MoE layer reads of one token, in bf16, with remat "none"."""
    m, chosen = MODEL, MODEL.num_experts_per_tok
    heads = m.num_attention_heads * (m.qk_nope_head_dim + m.qk_rope_head_dim + m.v_head_dim)
    latents = 2 * (m.q_lora_rank + m.kv_lora_rank + m.qk_rope_head_dim)
    rows = (4 + 2 * chosen) * m.hidden_size  # layer's and FFN's input, both normed; rows to and from the experts
    return 2 * (heads + latents + rows + 3 * (chosen + m.n_shared_experts) * m.moe_intermediate_size)


def cost(hardware: Hardware, layout: Layout) -> Cost:
    """Of one step."""
    expert, stage, microbatches = layout.expert, layout.stage, layout.microbatches
    per_device = layout.tokens * microbatches / stage
    compute = per_device * flops_per_token(WEIGHTS, MODEL, SEQUENCE) / (hardware.peak * MFU)
    exchange = EXCHANGES * per_device * MOE_LAYERS * domains_reached(expert, hardware.domain) * ROW
    if stage == 1:
        traffic, between, bubble, resident = (EXPERTS / expert + OTHERS) * 6 * microbatches, 0.0, 0.0, 0.0
        kept = layout.tokens * MODEL.num_hidden_layers * ROW
    else:
        own_layers = (EXPERTS / expert + OTHERS - TABLES - DENSE_LAYERS) / stage
        traffic = ((own_layers + DENSE_LAYERS) * 6 + TABLES * 8) * layout.passes
        # bf16 weights, float32 gradients, and of the stage's own layers those of one microbatch (bf16)
        resident = own_layers * 8 + DENSE_LAYERS * 6
        ticks = microbatches // layout.passes + stage - 1  # of a pass
        # a stage's output and a row of the stream, forwards and backwards
        between = 4 * ticks * layout.passes * layout.tokens * ROW
        bubble = (stage - 1) / ticks
        kept = (ticks * layout.tokens + OWN_ROWS * per_device / layout.passes) * ROW
        kept += layout.tokens * MOE_LAYERS / stage * layer_bytes()
    held_state = STATE * (EXPERTS + OTHERS) / layout.devices
    return Cost(
        compute, traffic / hardware.network, exchange / hardware.network, between / hardware.network, bubble,
        (resident + held_state) / 2**30, kept / 2**30,
    )  # fmt: skip


def table(hardware: Hardware, layouts: list[Layout]) -> None:
    print(f"\n{hardware.name}, {hardware.memory} GB\n")
    print("| layout | devices | tokens at once | compute s | weights s | exchange s | stages s | network / compute "
          "| bubble | state, weights, gradients GiB | activations GiB |\n|" + "---|" * 11)  # fmt: skip
    for layout in layouts:
        of = cost(hardware, layout)
        stages = f"{layout.passes} passes, " * (layout.passes > 1) + f"stage {layout.stage} x " * (layout.stage > 1)
        print(
            f"| {stages}fsdp {layout.fsdp} x expert {layout.expert} | {layout.devices:,} | {layout.tokens:,} "
            f"| {of.compute:.1f} | {of.weights:.1f} | {of.exchange:.1f} | {of.between_stages:.1f} "
            f"| {of.network_share:.2f} | {of.bubble:.1%} | {of.resident:.0f} | {of.activations:.0f} |"
        )


COMPARED = [
    (H100, [Layout(8, 256, 1, 32_768), Layout(8, 256, 1, 8_192), Layout(64, 32, 1, 32_768), Layout(64, 32, 1, 8_192),
            Layout(64, 8, 4), Layout(16, 8, 12), Layout(16, 8, 15), Layout(16, 8, 20)]),
    (H100, [Layout(8, 32, 1, 32_768), Layout(64, 4, 1, 32_768), Layout(16, 2, 15), Layout(16, 2, 15, passes=4)]),
    (GB200, [Layout(64, 16, 1, 65_536), Layout(64, 16, 1, 16_384), Layout(64, 4, 4)]),
    (V5P, [Layout(64, 16, 1, 65_536), Layout(64, 16, 1, 16_384), Layout(64, 64, 1, 16_384)]),
]  # fmt: skip


def main() -> None:
    total = sum(size for size, _ in count_parameters(WEIGHTS, MODEL).values())
    print(f"{total:,} parameters, {EXPERTS:,} of them experts'; a layer's activations {layer_bytes():,} bytes a token")
    for hardware, layouts in COMPARED:
        table(hardware, layouts)


if __name__ == "__main__":
    main()
