// Detection, names, and what is refused.
#include "tests/check.h"

using namespace prunekern;

int main() {
  const std::vector<Isa> isas = supported_isas();
  CHECK(!isas.empty() && isas.front() == Isa::generic, "generic must always be there");
  for (Isa isa : isas) CHECK(parse_isa(name(isa)) == isa, "%s", name(isa));
  if (std::getenv("PRUNEKERN_ISA") == nullptr) CHECK(active_isa() == isas.back(), "%s", name(active_isa()));
  for (Isa isa : isas)
    CHECK(panel_width(isa) == (isa >= Isa::avx512 ? 32 : isa >= Isa::avx2 ? 16 : 8), "%s", name(isa));
  CHECK(panel_width(Isa::generic) == 8 && panel_width(Isa::avx2) == 16 && panel_width(Isa::avx512) == 32,
        "a panel's width tells its instruction set");
  std::string message = message_of([] { parse_isa("sse9"); });
  CHECK(message ==
            "PRUNEKERN_ISA must be generic, avx2, avx2_vnni, avx512, avx512_vnni, avx512_bf16 or amx (got "
            "sse9)",
        "%s", message.c_str());
  message = message_of([] { parse_activation("sigmoid"); });
  CHECK(message == "activation must be none, relu, gelu, gelu_tanh, silu or quick_gelu (got sigmoid)", "%s",
        message.c_str());
  return 0;
}
