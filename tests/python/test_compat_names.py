"""The names and arguments of holdfast.compat: what programs written for the other libraries call."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

# Arguments in order, as those libraries have them; what stands behind "*" is of keywords.
NAMES = {
    "pygpukit": {
        "retention_init_decay": "num_heads",
        "retention_init_state": "num_heads head_dim dtype",
        "retention_parallel": "Q K V gamma",
        "retention_recurrent": "Q K V gamma state",
        "retention_chunkwise": "Q K V gamma chunk_size",
    },
    "yet_another_retnet": {
        "retention_parallel": "query key value scale need_weights",
        "retention_recurrent": "query key value prev_state scale",
        "retention_chunkwise": "query key value prev_state scale",
        "MultiScaleRetention": "embed_dim num_heads dropout relative_position bias batch_first activation "
        "group_norm_eps device dtype",
        "MultiScaleRetention.forward_parallel": "self query key value need_weights",
        "MultiScaleRetention.forward_recurrent": "self query key value seq_idx prev_state",
        "MultiScaleRetention.forward_chunkwise": "self query key value start_idx prev_state",
        "RetNet": "num_tokens d_model nhead num_layers dropout activation dim_feedforward norm_first layer_norm_eps "
        "device dtype",
        "RetNet.forward_parallel": "self x",
        "RetNet.forward_recurrent": "self x seq_idx prev_states",
        "RetNet.forward_chunkwise": "self x start_idx prev_states",
        "retnet_1_3b": "num_tokens device dtype",
    },
    "retention": {
        "power_retention": "Q K V log_G initial_state return_final_state deg scale chunk_size switch_over_seq_len",
        "power_retention_inference": "Q K V log_G initial_state sum_of_keys deg scale switch_over_seq_len",
        "power_full": "Q K V log_G initial_state return_final_state deg scale chunk_size",
    },
    "fla": {
        "chunk_retention": "q k v scale initial_state output_final_state cu_seqlens * chunk_size state_v_first",
        "fused_chunk_retention": "q k v scale initial_state output_final_state cu_seqlens * state_v_first",
        "fused_recurrent_retention": "q k v scale initial_state output_final_state reverse state_v_first cu_seqlens",
        "parallel_retention": "q k v scale output_attentions cu_seqlens",
        "chunk_simple_gla": "q k v g g_gamma scale initial_state output_final_state state_v_first cu_seqlens "
        "cu_seqlens_cpu * chunk_size",
        "fused_chunk_simple_gla": "q k v g g_gamma scale initial_state output_final_state cu_seqlens * state_v_first",
        "fused_recurrent_simple_gla": "q k v g g_gamma scale initial_state output_final_state reverse state_v_first "
        "cu_seqlens",
        "parallel_simple_gla": "q k v g scale output_attentions cu_seqlens cu_seqlens_cpu * g_gamma",
    },
    "torchscale": {
        "MultiScaleRetention": "args embed_dim value_dim num_heads gate_fn * row_scale",
        "MultiScaleRetention.forward": "self x rel_pos chunkwise_recurrent incremental_state",
        "RetNetDecoder": "args embed_tokens output_projection * row_scale",
    },
    "power_retention_mlx": {
        "PowerRetention": "dim power chunk_size use_metal_kernels",
        "PowerRetention.forward": "self x log_g",
        "PowerRetention.inference_step": "self x log_g",
        "PowerRetention.reset_state": "self",
    },
}


def module(name):
    if name != "pygpukit":
        pytest.importorskip("torch")
    return importlib.import_module(f"holdfast.compat.{name}")


@pytest.mark.parametrize("name", NAMES)
def test_signatures(name):
    for path, arguments in NAMES[name].items():
        found = module(name)
        for part in path.split("."):
            found = getattr(found, part)
        words, keywords = [], False
        for parameter in inspect.signature(found).parameters.values():
            if parameter.kind is parameter.KEYWORD_ONLY and not keywords:
                words.append("*")
                keywords = True
            words.append(parameter.name)
        assert " ".join(words) == arguments, path


@pytest.mark.parametrize("name", NAMES)
def test_document_has_all_names(name):
    document = (Path(__file__).parents[2] / "docs/compat.md").read_text()
    (row,) = re.findall(rf"^\| `holdfast\.compat\.{name}` \|.*$", document, re.MULTILINE)
    listed = set(re.findall(r"`(\w+)`", row))
    public = set(module(name).__all__)
    assert listed <= public
    assert set(NAMES[name]) & public <= listed


def test_pytorch_is_not_needed_until_a_module_needs_it():
    program = "import sys, holdfast.compat, holdfast.compat.pygpukit; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
