#include "decoder_math.inl"
#include "dispatch.h"

const rarefy::DecoderMath* rarefy::decoder_math_portable() { return &kMath; }

const rarefy::DecoderMath& rarefy::decoder_math() {
#if defined(RAREFY_X86)
  return pick(decoder_math_portable(), decoder_math_avx2(), decoder_math_avx512());
#else
  return kMath;
#endif
}
