// x, or where it is beyond a type's numbers the largest of them, by the type of a pointer that is not read: a decoded row
// may be larger than the row that was encoded. A NaN may become one of the ends.
METAL_FUNC float within(float x, const device float16_t*) { return clamp(x, -65504.0f, 65504.0f); }
METAL_FUNC float within(float x, const device bfloat16_t*) { return clamp(x, -3.3895314e38f, 3.3895314e38f); }
METAL_FUNC float within(float x, const device float*) { return clamp(x, -3.4028235e38f, 3.4028235e38f); }
