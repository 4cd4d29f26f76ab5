// Decodes the PNGs of panoptic segmentations (8-bit RGB, not interlaced) to segment ids.
//
// Such images are flat: most of the compressed data are long repetitions, and most residuals of PNG's
// row filters are zero. General decoders work pixel by pixel all the same; this one copies the
// repetitions in blocks and skips the zeros, several times faster. Everything that is wrong with the
// data throws: each chunk's CRC is checked, and every read and write is bounded.
#include "image.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <vector>

namespace psf {
namespace {

using Bytes = std::vector<uint8_t>;

constexpr size_t kPixel = 3;   // bytes
constexpr size_t kSlack = 64;  // bytes after a buffer that block copies may touch

struct Damaged : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// ------------------------------------------------------------------------------ PNG (RFC 2083)

uint32_t big_endian(const uint8_t* p) {
  return uint32_t{p[0]} << 24 | uint32_t{p[1]} << 16 | uint32_t{p[2]} << 8 | p[3];
}

std::array<uint32_t, 256> make_crc_table() {
  std::array<uint32_t, 256> table{};
  for (uint32_t i = 0; i < 256; i++) {
    uint32_t value = i;
    for (int bit = 0; bit < 8; bit++) value = value & 1 ? 0xEDB88320u ^ value >> 1 : value >> 1;
    table[i] = value;
  }
  return table;
}

uint32_t crc32(const uint8_t* p, size_t size) {
  static const std::array<uint32_t, 256> table = make_crc_table();
  uint32_t crc = ~0u;
  for (size_t i = 0; i < size; i++) crc = table[(crc ^ p[i]) & 255] ^ crc >> 8;
  return ~crc;
}

// The compressed data of all IDAT chunks, with kSlack zeros at the end.
Bytes join_data_chunks(const uint8_t* png, size_t size) {
  Bytes data;
  size_t at = 8;  // after the signature
  while (true) {
    if (size - at < 12) throw Damaged("it ends before its last chunk");
    const size_t length = big_endian(png + at);
    if (length > size - at - 12) throw Damaged("it ends within a chunk");
    const uint8_t* type = png + at + 4;
    if (crc32(type, length + 4) != big_endian(type + 4 + length)) {
      throw Damaged("the checksum of a chunk is wrong");
    }
    if (std::memcmp(type, "IDAT", 4) == 0) data.insert(data.end(), type + 4, type + 4 + length);
    if (std::memcmp(type, "IEND", 4) == 0) break;
    at += length + 12;
  }
  data.resize(data.size() + kSlack);
  return data;
}

// -------------------------------------------------------------------------- deflate (RFC 1951)

class BitReader {
 public:
  BitReader(const uint8_t* data, size_t size) : data_(data), size_(size) {}

  // Makes at least 56 bits available; beyond the end they are zeros.
  void fill() {
    while (count_ <= 56) {
      bits_ |= uint64_t{at_ < size_ ? data_[at_] : uint8_t{0}} << count_;
      at_++;
      count_ += 8;
    }
  }
  uint32_t peek(int count) const { return static_cast<uint32_t>(bits_ & ((1ull << count) - 1)); }
  void drop(int count) {
    bits_ >>= count;
    count_ -= count;
  }
  // At most 32 bits; after fill().
  uint32_t take(int count) {
    const uint32_t value = peek(count);
    drop(count);
    return value;
  }
  void align_to_byte() { drop(count_ & 7); }
  void check_end() const {
    if (at_ - count_ / 8 > size_) throw Damaged("its compressed data end too early");
  }

 private:
  const uint8_t* data_;
  size_t size_;
  size_t at_ = 0;
  uint64_t bits_ = 0;
  int count_ = 0;
};

// A Huffman code as one table, indexed by the next bits: symbol * 16 + length of the code.
class Code {
 public:
  // A code with unused entries is damaged only when such an entry is met.
  void build(const uint8_t* lengths, int num_symbols) {
    std::array<int, 16> count{};
    for (int i = 0; i < num_symbols; i++) count[lengths[i]]++;
    count[0] = 0;
    bits_ = 1;
    std::array<uint32_t, 16> next{};
    uint32_t code = 0;
    for (int length = 1; length <= 15; length++) {
      code = (code + count[length - 1]) << 1;
      next[length] = code;
      if (count[length]) bits_ = length;
      if (code + count[length] > 1u << length) throw Damaged("a Huffman code is impossible");
    }
    table_.assign(size_t{1} << bits_, 0);
    for (int symbol = 0; symbol < num_symbols; symbol++) {
      const int length = lengths[symbol];
      if (length == 0) continue;
      const uint32_t first = reverse(next[length]++, length);
      const auto entry = static_cast<uint16_t>(symbol << 4 | length);
      for (uint32_t i = first; i < table_.size(); i += 1u << length) table_[i] = entry;
    }
  }
  int decode(BitReader& reader) const {
    const uint16_t entry = table_[reader.peek(bits_)];
    if (entry == 0) throw Damaged("its compressed data have an unknown code");
    reader.drop(entry & 15);
    return entry >> 4;
  }

 private:
  static uint32_t reverse(uint32_t code, int length) {
    uint32_t reversed = 0;
    for (int i = 0; i < length; i++) reversed |= (code >> i & 1) << (length - 1 - i);
    return reversed;
  }
  std::vector<uint16_t> table_;
  int bits_ = 1;
};

struct Codes {
  Code literals, distances;
};

Codes fixed_codes() {
  std::array<uint8_t, 288> literals;
  std::fill(literals.begin(), literals.begin() + 144, uint8_t{8});
  std::fill(literals.begin() + 144, literals.begin() + 256, uint8_t{9});
  std::fill(literals.begin() + 256, literals.begin() + 280, uint8_t{7});
  std::fill(literals.begin() + 280, literals.end(), uint8_t{8});
  std::array<uint8_t, 30> distances;
  distances.fill(5);
  Codes codes;
  codes.literals.build(literals.data(), 288);
  codes.distances.build(distances.data(), 30);
  return codes;
}

Codes read_codes(BitReader& reader) {
  constexpr std::array<uint8_t, 19> order = {
      16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15};
  reader.fill();
  const int num_literals = static_cast<int>(reader.take(5)) + 257;
  const int num_distances = static_cast<int>(reader.take(5)) + 1;
  const int num_lengths = static_cast<int>(reader.take(4)) + 4;
  if (num_literals > 286 || num_distances > 30) throw Damaged("a Huffman code is impossible");
  std::array<uint8_t, 19> code_lengths{};
  for (int i = 0; i < num_lengths; i++) {
    reader.fill();
    code_lengths[order[i]] = static_cast<uint8_t>(reader.take(3));
  }
  Code of_lengths;
  of_lengths.build(code_lengths.data(), 19);

  std::array<uint8_t, 286 + 30> lengths{};
  const int total = num_literals + num_distances;
  for (int i = 0; i < total;) {
    reader.fill();
    const int symbol = of_lengths.decode(reader);
    if (symbol < 16) {
      lengths[i++] = static_cast<uint8_t>(symbol);
      continue;
    }
    if (symbol == 16 && i == 0) throw Damaged("a Huffman code is impossible");
    const uint8_t value = symbol == 16 ? lengths[i - 1] : uint8_t{0};
    const int repeat = symbol == 16   ? 3 + static_cast<int>(reader.take(2))
                       : symbol == 17 ? 3 + static_cast<int>(reader.take(3))
                                      : 11 + static_cast<int>(reader.take(7));
    if (repeat > total - i) throw Damaged("a Huffman code is impossible");
    std::fill_n(lengths.begin() + i, repeat, value);
    i += repeat;
  }
  Codes codes;
  codes.literals.build(lengths.data(), num_literals);
  codes.distances.build(lengths.data() + num_literals, num_distances);
  return codes;
}

// Repeats what stands `distance` bytes before `out`; may write up to kSlack bytes too many.
void copy_match(uint8_t* out, size_t distance, size_t length) {
  const uint8_t* const end = out + length;
  if (distance < 16) {
    // Lengthen the period to at least 16 bytes, so that blocks of 16 do not overlap.
    const size_t period = (16 + distance - 1) / distance * distance;
    const size_t head = std::min(period, length);
    for (size_t i = 0; i < head; i++) out[i] = out[static_cast<ptrdiff_t>(i - distance)];
    out += head;
    distance = period;
  }
  for (; out < end; out += 16) std::memcpy(out, out - distance, 16);
}

// Decodes one compressed block into [at, size) of `out`; returns the new end.
size_t inflate_block(BitReader& reader, const Codes& codes, Bytes& out, size_t at, size_t size) {
  constexpr std::array<uint16_t, 29> length_base = {
      3,  4,  5,  6,  7,  8,  9,  10, 11,  13,  15,  17,  19,  23, 27,
      31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258};
  constexpr std::array<uint8_t, 29> length_bits = {
      0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0};
  constexpr std::array<uint16_t, 30> distance_base = {
      1,   2,   3,   4,   5,   7,    9,    13,   17,   25,   33,   49,   65,    97,    129,
      193, 257, 385, 513, 769, 1025, 1537, 2049, 3073, 4097, 6145, 8193, 12289, 16385, 24577};
  while (true) {
    reader.fill();
    const int symbol = codes.literals.decode(reader);
    if (symbol == 256) return at;
    if (symbol < 256) {
      if (at == size) throw Damaged("it has more pixels than its header says");
      out[at++] = static_cast<uint8_t>(symbol);
      continue;
    }
    if (symbol > 285) throw Damaged("its compressed data have an unknown code");
    const size_t length = length_base[symbol - 257] + reader.take(length_bits[symbol - 257]);
    const int code = codes.distances.decode(reader);
    if (code > 29) throw Damaged("its compressed data have an unknown code");
    const size_t distance = distance_base[code] + reader.take(code < 4 ? 0 : (code - 2) / 2);
    if (distance > at) throw Damaged("its compressed data refer to what is not there");
    if (length > size - at) throw Damaged("it has more pixels than its header says");
    copy_match(out.data() + at, distance, length);
    at += length;
    reader.check_end();
  }
}

size_t inflate_stored(BitReader& reader, Bytes& out, size_t at, size_t size) {
  reader.align_to_byte();
  reader.fill();
  const uint32_t length = reader.take(16);
  if ((length ^ 0xFFFFu) != reader.take(16)) throw Damaged("a stored block is inconsistent");
  if (length > size - at) throw Damaged("it has more pixels than its header says");
  for (uint32_t i = 0; i < length; i++) {
    reader.fill();
    out[at++] = static_cast<uint8_t>(reader.take(8));
  }
  return at;
}

// Inflates a zlib stream (RFC 1950) of exactly `size` bytes; kSlack bytes follow them. Its own
// checksum is not compared: those of the chunks have been.
Bytes inflate(const Bytes& data, size_t size) {
  const size_t data_size = data.size() - kSlack;
  if (data_size < 2 || (data[0] & 15) != 8 || (data[0] * 256 + data[1]) % 31 != 0 || data[1] & 32) {
    throw Damaged("its compressed data are no zlib stream");
  }
  BitReader reader(data.data() + 2, data_size - 2);
  Bytes out(size + kSlack + 258);
  size_t at = 0;
  bool last = false;
  while (!last) {
    reader.fill();
    last = reader.take(1);
    switch (reader.take(2)) {
      case 0:
        at = inflate_stored(reader, out, at, size);
        break;
      case 1: {
        static const Codes fixed = fixed_codes();
        at = inflate_block(reader, fixed, out, at, size);
        break;
      }
      case 2:
        at = inflate_block(reader, read_codes(reader), out, at, size);
        break;
      default:
        throw Damaged("its compressed data have a block of unknown kind");
    }
    reader.check_end();
  }
  if (at != size) throw Damaged("it has fewer pixels than its header says");
  return out;
}

// ----------------------------------------------------------------------------------- row filters

// Whole pixels of zeros at the beginning of [p, p + size), in bytes.
size_t zero_run(const uint8_t* p, size_t size) {
  size_t i = 0;
  for (uint64_t word; i + 8 <= size; i += 8) {
    std::memcpy(&word, p + i, 8);
    if (word) break;
  }
  while (i < size && p[i] == 0) i++;
  return i / kPixel * kPixel;
}

// Repeats the pixel before `p` over [p, p + size).
void repeat_pixel(uint8_t* p, size_t size) {
  size_t done = std::min(kPixel, size);
  std::memcpy(p, p - kPixel, done);
  while (done < size) {
    const size_t step = std::min(done, size - done);
    std::memcpy(p + done, p, step);
    done += step;
  }
}

void undo_sub(uint8_t* row, size_t size) {
  for (size_t i = kPixel; i < size;) {
    const size_t zeros = zero_run(row + i, size - i);
    if (zeros) {
      repeat_pixel(row + i, zeros);
      i += zeros;
      continue;
    }
    for (size_t end = i + kPixel; i < end; i++) row[i] += row[i - kPixel];
  }
}

void undo_up(uint8_t* row, const uint8_t* above, size_t size) {
  for (size_t i = 0; i < size; i++) row[i] += above[i];
}

void undo_average(uint8_t* row, const uint8_t* above, size_t size) {
  for (size_t i = 0; i < kPixel; i++) row[i] += above[i] / 2;
  for (size_t i = kPixel; i < size; i++) row[i] += (row[i - kPixel] + above[i]) / 2;
}

uint8_t paeth(int left, int up, int corner) {
  const int to_left = std::abs(up - corner);
  const int to_up = std::abs(left - corner);
  const int to_corner = std::abs(left + up - 2 * corner);
  if (to_left <= to_up && to_left <= to_corner) return static_cast<uint8_t>(left);
  return static_cast<uint8_t>(to_up <= to_corner ? up : corner);
}

void undo_paeth(uint8_t* row, const uint8_t* above, size_t size) {
  for (size_t i = 0; i < kPixel; i++) row[i] += above[i];
  for (size_t i = kPixel; i < size;) {
    // Where left and corner are equal the prediction is the pixel above. With a residual of zero
    // that holds for the next pixel too, so that runs of zeros are copies of the row above.
    if (std::memcmp(row + i - kPixel, above + i - kPixel, kPixel) == 0) {
      const size_t zeros = zero_run(row + i, size - i);
      std::memcpy(row + i, above + i, zeros);
      i += zeros;
      if (i >= size) break;
    }
    for (size_t end = i + kPixel; i < end; i++) {
      row[i] += paeth(row[i - kPixel], above[i], above[i - kPixel]);
    }
  }
}

void undo_filter(uint8_t filter, uint8_t* row, const uint8_t* above, size_t size) {
  switch (filter) {
    case 0:
      return;
    case 1:
      return undo_sub(row, size);
    case 2:
      return undo_up(row, above, size);
    case 3:
      return undo_average(row, above, size);
    case 4:
      return undo_paeth(row, above, size);
    default:
      throw Damaged("a row has an unknown filter");
  }
}

}  // namespace

void decode_panoptic_png(
    const uint8_t* png, size_t png_size, uint32_t* ids, size_t height, size_t width) {
  const size_t row_size = kPixel * width;
  Bytes raw = inflate(join_data_chunks(png, png_size), height * (row_size + 1));
  const Bytes nothing(row_size);
  const uint8_t* above = nothing.data();
  for (size_t y = 0; y < height; y++) {
    uint8_t* row = raw.data() + y * (row_size + 1) + 1;
    undo_filter(row[-1], row, above, row_size);
    for (size_t x = 0; x < width; x++) {
      const uint8_t* p = row + kPixel * x;
      ids[y * width + x] = uint32_t{p[0]} | uint32_t{p[1]} << 8 | uint32_t{p[2]} << 16;
    }
    above = row;
  }
}

}  // namespace psf
