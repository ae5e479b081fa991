"""All families by name, which is the `model_type` of their config.json where that names one. A new one is a file and a line
here."""

from moejax.hf import bert, deepseek, granite, llama, mixtral, olmoe, qwen_moe, t5
from moejax.hf.dbrx import DBRX
from moejax.hf.ernie import ERNIE
from moejax.hf.family import Family
from moejax.hf.gpt2 import GPT2
from moejax.hf.gpt_oss import GPT_OSS
from moejax.hf.hunyuan import HUNYUAN
from moejax.hf.jetmoe import JETMOE
from moejax.hf.llama4 import LLAMA4
from moejax.hf.longcat import LONGCAT
from moejax.hf.phimoe import PHI_MOE

FAMILIES: dict[str, Family] = {family.name or family.model_type: family for family in (
    GPT2, llama.LLAMA, llama.MISTRAL, llama.QWEN2, llama.QWEN3,
    mixtral.MIXTRAL, mixtral.MINIMAX_M2, qwen_moe.QWEN2_MOE, qwen_moe.QWEN3_MOE, olmoe.OLMOE, olmoe.FLEX_OLMO,
    deepseek.DEEPSEEK_V2, deepseek.DEEPSEEK_V3, deepseek.GLM4_MOE, deepseek.DOTS1, GPT_OSS, granite.GRANITE_MOE,
    granite.GRANITE_MOE_SHARED, PHI_MOE, LLAMA4, ERNIE, HUNYUAN, DBRX, LONGCAT, JETMOE,
    bert.BERT, bert.BERT_CLASSIFIER, bert.BERT_ENCODER, t5.T5, t5.SWITCH)}
