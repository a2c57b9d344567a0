#include "soft.inl"

const rarefy::SoftRounding* rarefy::soft_rounding_portable() { return &kRounding; }
