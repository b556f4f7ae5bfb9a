// Where the bits of a code lie in a packed block (layout version 1), worked out at compile time.
//
// A code of `Bits` bits is cut into planes whose widths are the binary digits of `Bits`, widest first; the
// widest holds the lowest bits. A plane of width w takes w rows of the block, each byte holding 8 / w fields.
//
// Included inside an anonymous namespace, once per ISA: nothing here may be shared between translation units
// that are compiled for different processors.

struct Field {
  int row;    // row of the block
  int shift;  // right shift (negative: left) that brings the field to its place in the result
  int mask;   // bits of the result that the field fills
};

constexpr int PlaneCount(int bits) {
  int count = 0;
  for (int width = 8; width > 0; width /= 2) count += (bits & width) != 0;
  return count;
}

/// The part of plane `plane` that serves bits [low, low + width) of the codes of quad `quad`; mask 0 if none.
constexpr Field PlaneField(int bits, int plane, int low, int width, int quad) {
  int row = 0;
  int offset = 0;
  for (int w = 8; w > 0; w /= 2) {
    if (!(bits & w)) continue;
    if (plane-- > 0) {
      row += w;
      offset += w;
      continue;
    }
    const int per_byte = 8 / w;
    const int from = low > offset ? low : offset;
    const int to = low + width < offset + w ? low + width : offset + w;
    if (from >= to) return {row + quad / per_byte, 0, 0};
    const int shift = (quad % per_byte) * w + (from - offset) - (from - low);
    return {row + quad / per_byte, shift, ((1 << (to - from)) - 1) << (from - low)};
  }
  return {0, 0, 0};
}

static_assert(PlaneField(4, 0, 0, 4, 3).row == 1 && PlaneField(4, 0, 0, 4, 3).shift == 4);
static_assert(PlaneField(3, 1, 0, 3, 1).row == 2 && PlaneField(3, 1, 0, 3, 1).shift == -1 &&
              PlaneField(3, 1, 0, 3, 1).mask == 4);
static_assert(PlaneField(8, 0, 4, 4, 5).shift == 4 && PlaneField(8, 0, 4, 4, 5).mask == 15);
