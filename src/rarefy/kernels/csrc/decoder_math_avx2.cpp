#include "decoder_math.inl"

const rarefy::DecoderMath* rarefy::decoder_math_avx2() { return &kMath; }
