// prunekern: compact layers on the CPU. The whole public C++ API: raw pointers, strides, a thread count.
#pragma once

#include "prunekern/attention.h"
#include "prunekern/attention_block.h"
#include "prunekern/decoder_block.h"
#include "prunekern/disentangled_attention.h"
#include "prunekern/encoder_block.h"
#include "prunekern/fingerprint.h"
#include "prunekern/isa.h"
#include "prunekern/linear.h"
#include "prunekern/mlp.h"
#include "prunekern/norm.h"
#include "prunekern/prenorm_block.h"
#include "prunekern/rotary.h"
