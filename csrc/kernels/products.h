// The rows of the table that there are, by the file that makes them.
#pragma once

#include "kernels/product.h"
#ifdef PRUNEKERN_AMX
#include "kernels/amx.h"
#endif

namespace prunekern {

extern const Product kGenericInt8, kGenericInt4;
#ifdef PRUNEKERN_X86
extern const Product kAvx2Int8, kAvx512Int8, kAvx2Int4, kAvx512Int4;
#endif
#ifdef PRUNEKERN_AVX512_VNNI
extern const Product kAvx512VnniInt8, kAvx512VnniInt4;
#endif
#ifdef PRUNEKERN_AVX2_VNNI
extern const Product kAvx2VnniInt8, kAvx2VnniInt4;
#endif
#ifdef PRUNEKERN_AVX512_BF16
extern const Product kAvx512Bf16, kAvx512Bf16Heads;  // of layers; of attention
#endif

}  // namespace prunekern
