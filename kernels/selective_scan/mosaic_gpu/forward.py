"""Forward pass of the selective scan on Hopper: three to six warpgroups walk a block of channels through time.

Chunks of tokens go from one to the next through shared memory:
  prepare  dt and dt u in float32;
  recur    token by token: a thread has some states of a channel in registers. Of several groups each has a warpgroup,
           a single one has two where blocks are wide, each with half of the states;
  finish   sum over groups, skip and gate, y stored, the next chunk sent for.
In shared memory 4 tokens of a channel are side by side, so that who recurs loads and stores 16 bytes at a time.
Where there are few sequences and channels, blocks are narrow: more threads then share the states of a channel.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from seqmodels.kernels import lanes
from seqmodels.kernels.lanes import LOG2E, THREADS, read, write
from seqmodels.kernels.selective_scan.mosaic_gpu.stage import MARKED, SHARED, Stage, prepare
from seqmodels.kernels.selective_scan.mosaic_gpu.tile import STATES, Tile, thread_index

f32 = jnp.float32
MOST, FEWEST = 4, 3  # chunks in shared memory: the more if they fit
WORKERS = 5  # warpgroups that recur, at most
TOKENS = 4  # of a channel, side by side in shared memory
HELD = {128: 8, 64: 8, 32: 4, 16: 2}  # states of a channel that each thread takes, by channels of a block; see WORKERS
# By states a thread: tokens by which operands are loaded before they are worked on, and tokens written out
AHEAD, STRETCH = {1: 8, 2: 8, 4: 4, 8: 4, 16: 1}, {1: 64, 2: 64, 4: 16, 8: 16, 16: 8}
EARLY = {1: 1, 2: 2, 4: 2, 8: 1, 16: 1}  # tokens by which decays are made before they are needed
BRIDGED = 8  # up to so many states a thread, the first operands of a chunk are loaded during the one before it
# Registers of a thread that recurs and of another, by workers: in all what 5 warpgroups of 96, 6 of 80 begin with
WORKER, AIDE = {3: 112, 4: 88}, {3: 72, 4: 64}


@functools.partial(
    jax.jit, static_argnames=("softplus", "block", "chunk", "save")
)  # traced once a shape, not once a layer
def forward(u, dt, A, B, C, D, z, dt_bias, weights, initial_state, marks, *, softplus, block, chunk, save):
    """y, the final state, and the states at the start of every `save` tokens.

    Args:
        u, dt: [b, T, G, E] with E * itemsize a multiple of 16. z: [b, T, E] or None.
        A: [G, E', N] float32, N one of tile.SIZES, E' = E padded to whole blocks. D: [E'], dt_bias: [G, E'] float32.
        B, C: [b, T, G, N] float32. weights: [b, T, G - 1 or 1, E] or None.
        initial_state: [b, G, E', N] float32. marks: [b, T', 8] of `stage.marks`, T' is T padded to whole chunks.
        softplus: dt + dt_bias goes through softplus.
        block: channels of a block: 128, 64, 32 or 16, with at least 128 states in all.
        chunk: tokens a step, a multiple of save; times block it is 512, 1024 or 2048. save: 0 saves no states.

    Returns:
        y [b, T', E'] in u's dtype, final state [b, G, E', N] float32, states [b, T' / save, G E' N] float32
        in the order of the backward pass's threads (or None).
    """
    batch, length, groups, _ = u.shape
    _, padded, states = A.shape
    steps, workers = -(-length // chunk), workers_of(block, states, groups)
    of_worker = -(-groups // workers)  # groups of each
    shares = shares_of(block, states, groups)  # threads that share a channel and group
    own = states // shares  # states of each
    vector, tile = min(own, STATES), Tile(states)
    stretch = min(STRETCH.get(own, 8), chunk)
    ahead = min(AHEAD.get(own, 1), stretch)
    early = min(EARLY.get(own, 0), ahead)
    bridged = own <= BRIDGED
    columns = THREADS * TOKENS // chunk  # threads side by side where work is not shared over states
    wide = block // columns  # channels of each of them
    BC = jnp.stack([B, C], axis=-1).reshape(*B.shape[:3], 2 * states)
    slots = MOST if forward_bytes(u, dt, B, C, z, weights, block, chunk, MOST) <= SHARED else FEWEST
    stage = Stage(dict(u=u, dt=dt, BC=BC, z=z, weights=weights, marks=marks), chunk, block, groups, slots)

    def body(*refs):
        b, e = lax.axis_index("b"), lax.axis_index("e")
        count = len(stage.arrays)
        sources, refs = refs[:count], refs[count:]
        (A_g, D_g, bias_g, initial_g, y_g, final_g, *saved_g), refs = refs[: 6 + bool(save)], refs[6 + bool(save) :]
        *buffers, dt_s, x_s, y_s, ready, done = refs
        stage.bind(sources, buffers, b, e)

        column, first_token = lax.rem(thread_index(), columns), lax.div(thread_index(), columns) * TOKENS
        offset, tokens = column * wide, [first_token + i for i in range(TOKENS)]

        def place(row, first, position):
            """Of 4 tokens of a channel in row `row` of [rows, chunk / 4, block, 4]."""
            return (row * chunk + first) * block + position * TOKENS

        def budget(registers):
            if lanes.INTERPRET is None and workers in registers:
                most = 65536 // (THREADS * (2 + workers)) // 8 * 8  # of each thread at the start
                action = "increase" if registers[workers] > most else "decrease"
                plgpu.set_max_registers(registers[workers], action=action)

        @pl.when(lax.axis_index("role") == 0)
        def _():
            budget(AIDE)
            bias = [read(bias_g, g * padded + e * block + offset, wide) for g in range(groups)]
            for index in range(min(slots, steps)):
                stage.load(index, jnp.int32(index))

            def start(index):
                slot = lax.rem(index, slots)
                stage.wait(slot)
                for g in range(groups):
                    us = zip(*(stage.read("u", slot, token, offset, wide, g) for token in tokens))
                    dts = prepare(stage, slot, index, tokens, offset, bias[g], softplus, length, g)
                    for c, (u, dt) in enumerate(zip(us, zip(*(dt for _, dt in dts)))):  # of a channel, 4 tokens
                        at = place(g, first_token, c * columns + column)
                        write(dt_s.at[slot], at, dt)
                        write(x_s.at[slot], at, tuple(d * u for d, u in zip(dt, u)))
                plgpu.barrier_arrive(ready.at[slot])

            lax.fori_loop(0, steps, lambda index, _: start(index), None)

        @pl.when((lax.axis_index("role") > 0) & (lax.axis_index("role") <= workers))
        def _():
            budget(WORKER)
            worker = lax.axis_index("role") - 1
            position, share = lax.rem(thread_index(), block), lax.div(thread_index(), block)
            channel = e * block + lax.rem(position, columns) * wide + lax.div(position, columns)
            if groups == 1:
                first_group, share = 0, share + worker * (shares // workers)
            else:
                first_group = worker * of_worker
            first = share * own  # of the states

            def read_states(ref, number):
                """The thread's states of its channel in matrix `number` of [..., E', N]."""
                start = (number * padded + channel) * states + first
                return sum((read(ref, start, vector, at=n) for n in range(0, own, vector)), start=())

            def write_states(ref, number, h):
                for n in range(0, own, vector):
                    write(ref, (number * padded + channel) * states + first, h[n : n + vector], at=n)

            A = [read_states(A_g, first_group + g) for g in range(of_worker)]

            def load(coming, rest, index, start, k):
                """Append to `coming`, of token start + k: of each group dt, dt u and pairs B, C; and the reset.

                rest: dt and dt u of tokens that follow, for these are loaded 4 at a time.
                """
                slot = lax.rem(index, slots)
                if k % TOKENS == 0:
                    at, groups_of_worker = place(first_group, start, position), range(of_worker)
                    quads = [
                        [read(ref.at[slot], at, TOKENS, at=(g * chunk + k) * block) for ref in (dt_s, x_s)]
                        for g in groups_of_worker
                    ]
                    rest.extend([[(dt[i], x[i]) for dt, x in quads] for i in range(TOKENS)])
                pairs = [of_states(slot, start, k, g) for g in range(of_worker)]
                coming.append((rest.pop(0), pairs, stage.reset(slot, start + k) if "marks" in stage else None))

            def of_states(slot, start, k, g):
                """(B, C) of each of the thread's states and token start + k."""
                at, step = (first_group * states + first) * 2, min(2 * own, 4)
                flat = (stage.read("BC", slot, start, at + n, step, g, k) for n in range(0, 2 * own, step))
                flat = sum(flat, start=())
                return list(zip(flat[::2], flat[1::2]))

            def make(operands):
                """Of each of the groups exp(dt A), dt u B and C."""
                made, (steps, pairs, reset) = [], operands
                for A_group, (dt, x), BC in zip(A, steps, pairs):
                    exponents = [dt * a for a in A_group]
                    exponents = exponents if reset is None else [k + reset for k in exponents]
                    made.append(([jnp.exp2(k) for k in exponents], [x * b for b, _ in BC], [c for _, c in BC]))
                return made

            def advance(h, made):
                """s = exp(dt A) s + dt u B and s C, of each of the groups."""
                new = tuple(
                    tuple(a * s + b for a, s, b in zip(decays, s, added)) for s, (decays, added, _) in zip(h, made)
                )
                return new, [dot(s, C) for s, (_, _, C) in zip(new, made)]

            def recur(index, carry):
                """A chunk: operands are loaded, and then decays made, while tokens before are worked on.

                carry: states, and what is loaded and made of the tokens that come next; the last of these are in the
                next chunk (which is there long before).
                """

                def several(i, carry, last=False):
                    h, coming, near, rest = carry
                    start, coming, near, rest, four = i * stretch, list(coming), list(near), list(rest), []
                    for k in range(stretch):
                        if save and k % save == 0:
                            keep(h, (index * chunk + start + k) // save)
                        if not last or k + ahead < stretch:
                            load(coming, rest, index, start, k + ahead)
                        elif bridged:
                            if k + ahead == stretch:
                                pl.when(index + 1 < steps)(lambda: wait(index + 1))
                            load(coming, rest, index + 1, 0, k + ahead - stretch)
                        if coming:
                            near.append(make(coming.pop(0)))
                        h, ys = advance(h, near.pop(0))
                        four.append(ys)
                        if len(four) == TOKENS:
                            for g, y in enumerate(zip(*four)):
                                at = place(first_group * shares + share, start, position)
                                ahead_of = (g * shares * chunk + k + 1 - TOKENS) * block
                                write(y_s.at[lax.rem(index, slots)], at, y, at=ahead_of)
                            four = []
                    return h, coming, near, rest

                carry = lax.fori_loop(0, chunk // stretch - 1, several, carry)
                return several(chunk // stretch - 1, carry, last=True)

            def first_of(index):
                """What a chunk begins with: operands and decays of its first tokens."""
                coming, near, rest = [], [], []
                wait(index)
                for k in range(ahead):
                    load(coming, rest, index, 0, k)
                for _ in range(early):
                    near.append(make(coming.pop(0)))
                return coming, near, rest

            def keep(h, number):
                """Write the states at the start of a stretch of `save` tokens, in the order of the backward pass."""
                start = (b * (steps * chunk // save) + number) * (padded * groups * states)
                for g in range(of_worker):
                    at = start + tile.saved(channel, first_group + g, groups)
                    for n in range(0, own, vector):
                        state = lax.div(first + n, STATES) * STATES * tile.rows + lax.rem(first + n, STATES)
                        write(saved_g[0], at + state, h[g][n : n + vector])

            def wait(index):
                plgpu.barrier_wait(ready.at[lax.rem(index, slots)])
                stage.wait(lax.rem(index, slots))

            def step(index, carry):
                carry = recur(index, carry if bridged else (*carry, *first_of(index)))
                plgpu.barrier_arrive(done.at[lax.rem(index, slots)])
                return carry if bridged else carry[:1]

            numbers = [b * groups + first_group + g for g in range(of_worker)]
            h = tuple(read_states(initial_g, number) for number in numbers)
            h, *_ = lax.fori_loop(0, steps, step, (h, *first_of(jnp.int32(0))) if bridged else (h,))
            for number, of_group in zip(numbers, h):
                write_states(final_g, number, of_group)

        @pl.when(lax.axis_index("role") == workers + 1)
        def _():
            budget(AIDE)
            channel = e * block + offset
            D = read(D_g, channel, wide)

            def of_tokens(name, slot, group=0):
                """Of each of the thread's channels 4 tokens."""
                return list(zip(*(stage.read(name, slot, token, offset, wide, group) for token in tokens)))

            def readout(slot):
                """s C of the groups, each times its weight: of each of the thread's channels 4 tokens."""
                total = [None] * wide
                for g in range(groups):
                    weights = of_tokens("weights", slot, g - 1) if g > 0 and "weights" in stage else None
                    for c in range(wide):
                        at = [place(g * shares + s, first_token, c * columns + column) for s in range(shares)]
                        y = tuple(sum(parts) for parts in zip(*(read(y_s.at[slot], x, TOKENS) for x in at)))
                        y = y if weights is None else tuple(y * w for y, w in zip(y, weights[c]))
                        total[c] = y if total[c] is None else tuple(a + b for a, b in zip(total[c], y))
                return total

            def finish(index):
                """y = (s C + D u) silu(z)."""
                slot = lax.rem(index, slots)
                us = of_tokens("u", slot)
                ys = [tuple(y + d * u for y, u in zip(y, u)) for y, d, u in zip(readout(slot), D, us)]
                if "z" in stage:
                    zs = of_tokens("z", slot)
                    ys = [tuple(y * z * lanes.sigmoid(z) for y, z in zip(y, z)) for y, z in zip(ys, zs)]
                for token, y in zip(tokens, zip(*ys)):
                    write(y_g, ((b * steps + index) * chunk + token) * padded + channel, y)

            def step(index, _):
                slot = lax.rem(index, slots)
                plgpu.barrier_wait(done.at[slot])
                finish(index)
                plgpu.commit_smem()  # all threads are through with this slot
                pl.when(index + slots < steps)(lambda: stage.load(slot, index + slots))

            lax.fori_loop(0, steps, step, None)

    sds = jax.ShapeDtypeStruct
    out = [sds((batch, steps * chunk, padded), u.dtype), sds((batch, groups, padded, states), f32)]
    if save:
        out.append(sds((batch, steps * chunk // save, groups * padded * states), f32))
    kernel = plgpu.kernel(
        body,
        out_type=tuple(out),
        scratch_types=[
            *stage.scratch(),
            *[plgpu.SMEM((slots, groups, chunk * block), f32)] * 2,
            plgpu.SMEM((slots, groups * shares, chunk * block), f32),
            plgpu.Barrier(num_barriers=slots),
            plgpu.Barrier(num_barriers=slots, num_arrivals=workers),
        ],
        grid=(batch, padded // block),
        grid_names=("b", "e"),
        num_threads=2 + workers,
        thread_name="role",
        compiler_params=lanes.compiler_params(),
        interpret=lanes.INTERPRET,
    )
    y, final, *saved = kernel(*stage.arrays.values(), A * LOG2E, D, dt_bias, initial_state)
    return y, final, saved[0] if save else None


def workers_of(block, states, groups) -> int:
    """Warpgroups that recur: one for each of several groups; of a single one, as many as its states want."""
    if groups > 1:
        return groups if groups <= WORKERS else 1
    return min(WORKERS, 4, max(1, block * states // (THREADS * HELD[block])))


def shares_of(block, states, groups) -> int:
    """Threads that share the states of a channel and group."""
    return THREADS // block * (1 if groups > 1 else workers_of(block, states, groups))


def affordable(block, states, groups) -> bool:
    """Whether the registers of so many warpgroups hold a thread's states and operands."""
    return groups == 1 or states // shares_of(block, states, groups) <= (16 if groups <= 4 else 8)


def forward_bytes(u, dt, B, C, z, weights, block, chunk, slots=FEWEST) -> int:
    """Shared memory of a block."""
    groups, states = u.shape[2], B.shape[3]
    BC = jax.ShapeDtypeStruct((*B.shape[:3], 2 * states), f32)
    stage = Stage(dict(u=u, dt=dt, BC=BC, z=z, weights=weights, marks=MARKED), chunk, block, groups, slots)
    return stage.bytes() + slots * chunk * groups * block * (2 + shares_of(block, states, groups)) * 4


def dot(a, b):
    """sum_n a_n b_n in four chains, for each addition waits for the one before it."""
    chains = [None] * 4
    for n, (x, y) in enumerate(zip(a, b)):
        chains[n % 4] = x * y if chains[n % 4] is None else chains[n % 4] + x * y
    first, *rest = (chain for chain in chains if chain is not None)
    return sum(rest, start=first)
