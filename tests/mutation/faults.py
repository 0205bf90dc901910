"""The faults, each with a test that must catch it."""

from __future__ import annotations

from dataclasses import dataclass

PARITY = "tests/patches/test_parity.py::test_topk_logits_and_gradients_equal_hugging_face"
FIRST_PARITY = f"{PARITY}[0-5.2]"
INDEXER = "tests/attention/test_indexer.py"
RECOMPUTE = "tests/patches/test_recompute.py"
SPLITS = "tests/distributed/test_parallel.py"
SERVED = "tests/training/test_served.py"
PHASES = "tests/training/test_phases.py"
TRITON = "tests/ops/test_triton.py"
BACKENDS = "tests/ops/test_registry.py::test_a_backend_computes_what_the_reference_does"
MTP = "tests/checkpoint/test_checkpoint.py::test_an_mtp_layer_is_loaded_under_its_published_names"


@dataclass(frozen=True)
class Fault:
    """``old`` must occur exactly once in ``glm5_patch/file``."""

    name: str
    file: str
    old: str
    new: str
    test: str
    """What pytest is given; it passes without the fault and fails with it."""


REPLAY = "tests/topk/test_replay.py"
ORACLE = "tests/testing/test_oracle.py"

FAULTS = (
    Fault(
        "a fault under which some tokens agree explains a model",
        "testing/oracle/explain.py",
        "return bool((errors <= BOUND).all())",
        "return bool((errors <= BOUND).any())",
        f"{ORACLE}::test_a_fault_is_named[indexer_k_norm_eps]",
    ),
    Fault(
        "a model passes if one of its two faults is allowed",
        "testing/oracle/judge.py",
        "any({f.id for f in one} <= set(allow)",
        "any({f.id for f in one} & set(allow) == set(allow)",
        f"{ORACLE}::test_several_faults_are_named[yarn_megatron+indexer_rope_half_split]",
    ),
    Fault(
        "an oracle selects keys after the query",
        "testing/oracle/reference.py",
        "selected &= self.visible",
        "pass",
        f"{ORACLE}::test_a_right_model_is_right[0-5.2]",
    ),
    Fault(
        "all sequences of a batch replay into the first",
        "topk/replay.py",
        "places.append(of_rows + document.batch * s)",
        "places.append(of_rows)",
        f"{REPLAY}::test_a_padded_batch_replays_its_sequences",
    ),
    Fault(
        "a recording is stored as differences and read as keys",
        "ops/recorded_keys/reference.py",
        "chosen[row] = frame.flips[row][classes]",
        "pass",
        "tests/topk/test_record.py::test_the_keys_come_back",
    ),
    Fault(
        "a recompute decodes a layer that nobody asks for",
        "topk/replay.py",
        "if following is not None and not self._ended:",
        "if following is not None:",
        "tests/topk/test_ahead.py::test_a_recompute_decodes_one_layer_at_a_time_from_the_last",
    ),
    Fault(
        "a recording that must have an MTP layer may lack it",
        "topk/replay.py",
        "if lacking and self._replay.require_mtp:",
        "if False:",
        "tests/topk/test_mtp_replay.py::test_an_mtp_layer_that_is_not_recorded_selects_for_itself",
    ),
    Fault(
        "a document without a recording attends to its first keys",
        "topk/source.py",
        "            _select_missing(indexer, inputs, layout, decoded)",
        "            pass",
        f"{REPLAY}::test_a_pack_replays_its_documents_and_selects_for_the_others",
    ),
    Fault(
        "documents of a pack are computed in the blocks of the pack",
        "ops/query_positions.py",
        "slots = local[rows] - first",
        "slots = torch.arange(len(rows))",
        "tests/ops/test_invariance.py",
    ),
    Fault(
        "k_norm has the epsilon of the other norms",
        "attention/indexer.py",
        "eps=config.dsa_indexer_k_norm_epsilon,",
        "eps=config.layernorm_epsilon,",
        FIRST_PARITY,
    ),
    Fault(
        "the rotary dimensions of the indexer come last",
        "attention/indexer.py",
        "query = rotate(query, rotation, first=0)",
        "query = rotate(query, rotation, first=self.index_head_dim - self.qk_pos_emb_head_dim)",
        FIRST_PARITY,
    ),
    Fault(
        "the weights of the indexer are scaled by its width and not by its heads",
        "attention/indexer.py",
        "weights = weights * self.index_n_heads**-0.5",
        "weights = weights * self.index_head_dim**-0.5",
        f"{INDEXER}::test_the_logged_loss_and_its_gradients_are_those_of_the_definition",
    ),
    Fault(
        "no relu on the index scores",
        "ops/index_topk/reference.py",
        "per_head.mul_(scale).relu_()",
        "per_head.mul_(scale)",
        FIRST_PARITY,
    ),
    Fault(
        "empty places of a top-k name the first key",
        "ops/index_topk/reference.py",
        "found = torch.full(shape, -1, dtype=torch.int32",
        "found = torch.full(shape, 0, dtype=torch.int32",
        "tests/patches/test_parity.py::test_short_rows_select_exactly_what_they_see",
    ),
    Fault(
        "equal scores fall to the last keys",
        "ops/index_topk/reference.py",
        "(equal.cumsum(-1) <= spare)",
        "(equal.flip(-1).cumsum(-1).flip(-1) <= spare)",
        f"{INDEXER}::test_equal_scores_fall_to_the_first_keys",
    ),
    Fault(
        "nobody selects where one key too many is visible",
        "ops/query_positions.py",
        "return self.most_keys <= index_topk",
        "return self.most_keys <= index_topk + 1",
        f"{INDEXER}::test_with_one_key_more_than_the_top_k_one_is_left_out",
    ),
    Fault(
        "documents of a pack see each other",
        "ops/query_positions.py",
        "starts, local = queries.starts.cpu(), queries.local_positions.cpu()",
        "starts, local = queries.starts.cpu() * 0, queries.places.cpu()",
        f"{RECOMPUTE}::test_a_pack_equals_its_documents_one_by_one",
    ),
    Fault(
        "the attention kernel sees its first tile of keys alone",
        "ops/sparse_attention/triton_kernels.py",
        "out_1 = tl.zeros([HEADS, HALF], tl.float32)\n    for first in tl.range(0, count, KEYS,",
        "out_1 = tl.zeros([HEADS, HALF], tl.float32)\n    for first in tl.range(0, KEYS, KEYS,",
        BACKENDS,
    ),
    Fault(
        "the loss kernel normalises over its last tile of keys alone",
        "ops/index_loss/triton_kernels.py",
        "total = total * tl.exp2(largest - larger) + tl.sum(probs, 1)",
        "total = tl.sum(probs, 1)",
        BACKENDS,
    ),
    Fault(
        "the loss kernel does not read the log-sum-exp that the attention found",
        "ops/index_loss/triton_kernels.py",
        "lse = tl.load(LSE + query, mask=own, other=0.0)",
        "lse = tl.load(LSE + query, mask=own, other=0.0) * 0.9",
        BACKENDS,
    ),
    Fault(
        "the heads of a second program replace those of the first in the target",
        "ops/index_loss/triton_kernels.py",
        "sums += tl.load(SUMS + line + place, mask=place < count)",
        "sums += 0.0",
        "tests/ops/test_devices.py",
    ),
    Fault(
        "a gradient is turned like what it is of",
        "ops/rotation/triton_kernels.py",
        "first = _product(left, cos_0) + _product(right, sin_1)",
        "first = _product(left, cos_0) - _product(right, sin_1)",
        "tests/ops/test_rotation.py",
    ),
    Fault(
        "halves between two numbers of e4m3 are rounded up",
        "ops/quantization/triton_kernels.py",
        "bits += (1 << DROPPED - 1) - 1 + ((bits >> DROPPED) & 1)",
        "bits += 1 << DROPPED - 1",
        "tests/ops/test_fp8.py",
    ),
    Fault(
        "the smallest numbers of e4m3 have as many bits as the others",
        "ops/quantization/triton_kernels.py",
        "tl.abs(number) < 2**-6",
        "tl.abs(number) < 2**-9",
        "tests/ops/test_fp8.py",
    ),
    Fault(
        "a row's scale in fp8 is a power of two below its largest number",
        "ops/quantization/triton_kernels.py",
        "exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32)",
        "exponent = bits >> 23",
        "tests/ops/test_fp8.py",
    ),
    Fault(
        "the dense loss takes the log-sum-exp of the selected keys",
        "ops/index_loss/triton.py",
        "attention._replace(topk_indices=None, lse=None)",
        "attention._replace(topk_indices=None)",
        "tests/ops/test_index_loss.py",
    ),
    Fault(
        "the backward of the attention kernel sees its first tile of keys alone",
        "ops/sparse_attention/triton_kernels.py",
        "d_q_rope = tl.zeros([HEADS, ROPE], tl.float32)\n    for first in tl.range(0, count, KEYS,",
        "d_q_rope = tl.zeros([HEADS, ROPE], tl.float32)\n    for first in tl.range(0, KEYS, KEYS,",
        BACKENDS,
    ),
    Fault(
        "the loss kernel has gradients of its first tile of keys alone",
        "ops/index_loss/triton_kernels.py",
        "d_weights = tl.zeros([HEADS], tl.float32)\n    for first in range(0, count, KEYS):",
        "d_weights = tl.zeros([HEADS], tl.float32)\n    for first in range(0, KEYS, KEYS):",
        BACKENDS,
    ),
    Fault(
        "the bound of a key's gradient leaves out what it is as a value",
        "ops/sparse_attention/triton_kernels.py",
        "most = probs * (difference * most_q[:, None] + most_d_out[:, None])",
        "most = probs * (difference * most_q[:, None])",
        "tests/ops/test_exact_sums.py",
    ),
    Fault(
        "what the lower sum of a pair borrows is not given back to the upper one",
        "ops/exact_sums.py",
        "upper = ((self.integers - lower) >> 32).int()",
        "upper = (self.integers >> 32).int()",
        "tests/ops/test_exact_sums.py",
    ),
    Fault(
        "the sample of a very long row is that of a short one",
        "ops/index_topk/triton.py",
        "        room *= 2\n",
        "        break\n",
        f"{TRITON}::test_a_sample_of_a_long_row_seldom_misleads",
    ),
    Fault(
        "fewer candidates than keys to select are enough",
        "ops/index_topk/triton_kernels.py",
        "found = (written >= k) & (written <= CAPACITY)",
        "found = written <= CAPACITY",
        f"{TRITON}::test_too_few_candidates_are_noticed",
    ),
    Fault(
        "more candidates than there is room for are dropped",
        "ops/index_topk/triton_kernels.py",
        "found = (written >= k) & (written <= CAPACITY)",
        "found = written >= k",
        f"{TRITON}::test_long_rows_are_selected_from_candidates",
    ),
    Fault(
        "of equal scores the selection kernel takes any",
        "ops/index_topk/triton_kernels.py",
        "chosen = chosen & ((value > kth) | (order <= spare))",
        "chosen = chosen & ((value > kth) | (order <= k))",
        f"{TRITON}::test_equal_scores_go_to_the_lower_positions",
    ),
    Fault(
        "queries that their sample misled are left out",
        "ops/index_topk/triton_kernels.py",
        "if tl.load(COUNTS + row) < 0:",
        "if tl.load(COUNTS + row) < -1:",
        f"{TRITON}::test_long_rows_are_selected_from_candidates",
    ),
    Fault(
        "queries that their sample misled are left out in one pass",
        "ops/index_topk/triton_kernels.py",
        "misled = (last - start >= k) & (count < 0)",
        "misled = (last - start >= k) & (count < -1)",
        "tests/ops/test_one_pass.py",
    ),
    Fault(
        "a program of misled queries writes where its first ones are",
        "ops/index_topk/triton_kernels.py",
        "out += stride.to(tl.int64) * k",
        "out += stride.to(tl.int64) * 0",
        "tests/ops/test_one_pass.py",
    ),
    Fault(
        "keys of a union are marked for a neighbour",
        "ops/sparse_attention/union_kernels.py",
        "<< key % 4 * 8",
        "<< key % 2 * 8",
        "tests/ops/test_unions.py::test_unions_are_those_of_sets",
    ),
    Fault(
        "a union is read again in the next block of groups",
        "ops/sparse_attention/union_kernels.py",
        "tl.store(MEMBERS + key, tl.zeros([BLOCK], tl.uint8), mask=member)",
        "tl.store(MEMBERS + key, tl.zeros([BLOCK], tl.uint8), mask=member & (key < 0))",
        "tests/ops/test_unions.py::test_unions_are_those_of_sets",
    ),
    Fault(
        "no relu on the scores of the kernel",
        "ops/index_topk/triton_kernels.py",
        "products = tl.maximum(products, 0.0) * weights[None, :]",
        "products = products * weights[None, :]",
        f"{TRITON}::test_selection",
    ),
    Fault(
        "padding is load of the experts",
        "patches/megatron_core/running/router_padding.py",
        "return wrapped(routing_map & ~padding_mask.reshape(-1, 1))",
        "return wrapped(routing_map)",
        "tests/patches/test_padding.py",
    ),
    Fault(
        "the logged loss is another than the one that trains",
        "attention/loss_log.py",
        "loss=loss,\n        layer_number=",
        "loss=loss * 2,\n        layer_number=",
        f"{INDEXER}::test_the_logged_loss_and_its_gradients_are_those_of_the_definition",
    ),
    Fault(
        "the indexer's loss is a sum over the batch",
        "ops/index_loss/operation.py",
        "coefficient / (mean_over * b)",
        "coefficient / mean_over",
        f"{INDEXER}::test_the_logged_loss_and_its_gradients_are_those_of_the_definition",
    ),
    Fault(
        "the scale of the routed experts is left at a default",
        "config/huggingface.py",
        '"moe_router_topk_scaling_factor": self.routed_scaling_factor,',
        '"moe_router_topk_scaling_factor": 2.5,',
        FIRST_PARITY,
    ),
    Fault(
        "the epsilon of the norms is left at a default",
        "config/huggingface.py",
        '"layernorm_epsilon": self.rms_norm_eps,',
        '"layernorm_epsilon": 1e-5,',
        FIRST_PARITY,
    ),
    Fault(
        "shared experts count once",
        "config/huggingface.py",
        "* self.n_shared_experts,",
        "* 1,",
        FIRST_PARITY,
    ),
    Fault(
        "the offset of the schedule counts from zero",
        "config/schedule.py",
        "max(n - offset, 0) % freq == 0",
        "max(n - 1 - offset, 0) % freq == 0",
        "tests/config/test_schedule.py",
    ),
    Fault(
        "a convention of GLM-5's by another default",
        "config/fields.py",
        '"dsa_indexer_rope_interleaved": True,',
        '"dsa_indexer_rope_interleaved": False,',
        "tests/patches/test_config_fields.py",
    ),
    Fault(
        "a stage may start on a skip layer",
        "config/pipeline_split.py",
        "if source in chunk:",
        "if True:",
        "tests/config/test_pipeline_split.py",
    ),
    Fault(
        "the plan's last stage has the first one's layers",
        "tools/plan/pipeline.py",
        '"--decoder-last-pipeline-num-layers": sizes[-1],',
        '"--decoder-last-pipeline-num-layers": sizes[0],',
        "tests/patches/test_plans.py::test_plans_are_ranked_and_two_numbers_are_offered_too",
    ),
    Fault(
        "the plan forgets the output layer",
        "tools/plan/pipeline.py",
        "after=costs.output + ",
        "after=0.0 + ",
        "tests/config/test_costs.py",
    ),
    Fault(
        "the plan counts all experts as active",
        "config/costs.py",
        "experts = hf.num_experts_per_tok + hf.n_shared_experts",
        "experts = hf.n_routed_experts + hf.n_shared_experts",
        "tests/config/test_costs.py",
    ),
    Fault(
        "a computing layer scores every key twice",
        "config/costs.py",
        "+ index_width * visible",
        "+ index_width * seq_length",
        "tests/config/test_costs.py",
    ),
    Fault(
        "enorm and hnorm of MTP are exchanged",
        "checkpoint/names.py",
        '"enorm.weight": ("enorm.weight",),\n    "hnorm.weight": ("hnorm.weight",),',
        '"enorm.weight": ("hnorm.weight",),\n    "hnorm.weight": ("enorm.weight",),',
        MTP,
    ),
    Fault(
        "a half-written file of a conversion counts as done",
        "checkpoint/staging.py",
        'unfinished = target.with_name(f".{target.name}.unfinished")',
        "unfinished = target",
        "tests/checkpoint/test_killed.py",
    ),
    Fault(
        "a recompute takes the top-k of whichever forward ran last",
        "topk/carrier.py",
        "with open_carrier(carrier):\n                return function",
        "with open_carrier(_current.get() or carrier):\n                return function",
        "tests/topk/test_carrier.py",
    ),
    Fault(
        "a top-k is freed although a recompute reads it again",
        "topk/carrier.py",
        "slot.recomputed |= self._in_checkpoint",
        "pass",
        "tests/topk/test_carrier.py",
    ),
    Fault(
        "the gradient of the latent is that of the last block of queries",
        "ops/sparse_attention/absorption.py",
        "return block if total is None else total.float().add_(block)",
        "return block",
        "tests/ops/test_blocks.py",
    ),
    Fault(
        "a backward keeps a query that it can make again",
        "ops/sparse_attention/absorption.py",
        "kept_query = query if ctx.make_query is None else None",
        "kept_query = query",
        "tests/attention/test_mla.py",
    ),
    Fault(
        "a top-k in host memory comes back as another layer's",
        "topk/offload.py",
        "if layer_number not in self._arriving:",
        "if not self._arriving:",
        "tests/topk/test_offload.py",
    ),
    Fault(
        "a recompute selects its top-k again",
        "topk/source.py",
        "None if saved_in is None else saved_in.published(self.layer_number)",
        "None",
        "tests/topk/test_source.py",
    ),
    Fault(
        "a layer of multi-token prediction publishes its top-k",
        "topk/source.py",
        "saved_in = carrier if carrier.is_of_mtp else None",
        "pass",
        "tests/topk/test_source.py",
    ),
    Fault(
        "a selection is made where every key fits",
        "topk/source.py",
        "topk_indices is None and not every_key_fits",
        "topk_indices is None",
        "tests/topk/test_source.py",
    ),
    Fault(
        "a patch that fails leaves the host half changed",
        "patching/machine.py",
        "seams.undo()\n            if not isinstance",
        "pass\n            if not isinstance",
        "tests/patches/test_failing_apply.py",
    ),
    Fault(
        "the indexer loss of every microbatch counts whole",
        "patches/megatron_core/running/indexer_training.py",
        "scale = scale / num_microbatches",
        "scale = scale / 1",
        "tests/patches/test_indexer_loss_scale.py",
    ),
    Fault(
        "context parallelism cuts its chunks elsewhere",
        "topk/tokens.py",
        "for number in (rank, 2 * size - 1 - rank):",
        "for number in (rank, size + rank):",
        "tests/topk/test_tokens.py",
    ),
    Fault(
        "a phase that freezes the indexers trains them",
        "training/phases.py",
        "trains &= not (of_indexer and phase == FROZEN_INDEXER)",
        "trains &= True",
        "tests/training/test_phases.py",
    ),
    Fault(
        "the pytest plugin leaves patches on that it has switched on",
        "testing/pytest_plugin.py",
        "        if not was_on:\n            glm5_patch.disable()",
        "        pass",
        "tests/testing/test_pytest_plugin.py::test_each_test_has_the_patches_that_it_asks_for",
    ),
    Fault(
        "the gradients of indexers are those of this rank's tokens alone",
        "attention/indexer.py",
        "parameter.sequence_parallel = self.token_group is not None",
        "parameter.sequence_parallel = False",
        SPLITS,
    ),
    Fault(
        "the target of the loss is that of this rank's heads",
        "ops/index_loss/reference.py",
        "torch.distributed.all_reduce(target, group=tp_group)",
        "pass",
        SPLITS,
    ),
    Fault(
        "an indexer learns from one of its layers alone",
        "ops/index_loss/served.py",
        "self._probabilities += probabilities",
        "pass",
        f"{SERVED}::test_gradients_are_the_mean_of_those_of_each_layer",
    ),
    Fault(
        "a frozen trunk goes on to balance its experts",
        "training/phases.py",
        "asked if balances else 0.0",
        "asked",
        f"{PHASES}::test_a_frozen_trunk_keeps_its_routing",
    ),
)
