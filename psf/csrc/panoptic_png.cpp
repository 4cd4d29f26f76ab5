// Decodes PNGs (8-bit RGB, not interlaced) to pixels, and those of panoptic segmentations to ids.
//
// The latter are flat: most of the compressed data are long repetitions, and most residuals of PNG's
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
#include <string_view>
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

// [k][byte]: what a byte contributes that k bytes follow.
using CrcTables = std::array<std::array<uint32_t, 256>, 8>;

CrcTables make_crc_tables() {
  CrcTables tables{};
  for (uint32_t i = 0; i < 256; i++) {
    uint32_t value = i;
    for (int bit = 0; bit < 8; bit++) value = value & 1 ? 0xEDB88320u ^ value >> 1 : value >> 1;
    tables[0][i] = value;
  }
  for (size_t k = 1; k < 8; k++) {
    for (size_t i = 0; i < 256; i++) {
      const uint32_t value = tables[k - 1][i];
      tables[k][i] = tables[0][value & 255] ^ value >> 8;
    }
  }
  return tables;
}

uint32_t crc32(const uint8_t* p, size_t size) {
  static const CrcTables tables = make_crc_tables();
  uint32_t crc = ~0u;
  for (; size >= 8; p += 8, size -= 8) {
    crc = tables[7][(crc ^ p[0]) & 255] ^ tables[6][(crc >> 8 ^ p[1]) & 255] ^
          tables[5][(crc >> 16 ^ p[2]) & 255] ^ tables[4][crc >> 24 ^ p[3]] ^ tables[3][p[4]] ^
          tables[2][p[5]] ^ tables[1][p[6]] ^ tables[0][p[7]];
  }
  for (size_t i = 0; i < size; i++) crc = tables[0][(crc ^ p[i]) & 255] ^ crc >> 8;
  return ~crc;
}

struct Chunk {
  std::string_view type;
  const uint8_t* data;
  size_t size;
};

// All chunks until the end, which is the last of them.
std::vector<Chunk> read_chunks(const uint8_t* png, size_t size) {
  std::vector<Chunk> chunks;
  size_t at = 8;  // after the signature
  do {
    if (size - at < 12) throw Damaged("it ends before its last chunk");
    const size_t length = big_endian(png + at);
    if (length > size - at - 12) throw Damaged("it ends within a chunk");
    const uint8_t* type = png + at + 4;
    if (crc32(type, length + 4) != big_endian(type + 4 + length)) {
      throw Damaged("the checksum of a chunk is wrong");
    }
    chunks.push_back({{reinterpret_cast<const char*>(type), 4}, type + 4, length});
    at += length + 12;
  } while (chunks.back().type != "IEND");
  return chunks;
}

// The compressed data of all IDAT chunks, with kSlack zeros at the end.
Bytes join_data(const std::vector<Chunk>& chunks) {
  Bytes data;
  for (const Chunk& chunk : chunks) {
    if (chunk.type == "IDAT") data.insert(data.end(), chunk.data, chunk.data + chunk.size);
  }
  data.resize(data.size() + kSlack);
  return data;
}

template <size_t size>
bool contains(const std::array<std::string_view, size>& names, std::string_view name) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

// Whether no reader of images derives from it what the pixels are, nor which side is up, as from
// transparency, frames of an animation, and EXIF or XMP (which are also stored as texts).
bool is_harmless(const Chunk& chunk) {
  constexpr std::array<std::string_view, 3> any = {"bKGD", "sBIT", "tIME"};
  constexpr std::array<std::string_view, 12> keywords = {
      "Author",
      "Comment",
      "Copyright",
      "Creation Time",
      "Description",
      "Disclaimer",
      "Software",
      "Source",
      "Title",
      "Warning",
      "date:create",
      "date:modify"};
  if (chunk.type == "tEXt") {
    const std::string_view text(reinterpret_cast<const char*>(chunk.data), chunk.size);
    return contains(keywords, text.substr(0, text.find('\0')));
  }
  return contains(any, chunk.type) || (chunk.type == "gAMA" && chunk.size == 4) ||
         (chunk.type == "cHRM" && chunk.size == 32) || (chunk.type == "pHYs" && chunk.size == 9) ||
         (chunk.type == "sRGB" && chunk.size == 1);
}

// Throws unless there are a header of 8-bit RGB, IDAT chunks in a row, the end, and harmless chunks.
void require_plain(const std::vector<Chunk>& chunks, size_t height, size_t width) {
  constexpr std::array<uint8_t, 5> kind = {8, 2, 0, 0, 0};
  const Chunk& header = chunks.front();
  if (header.type != "IHDR" || header.size != 13 || big_endian(header.data) != width ||
      big_endian(header.data + 4) != height ||
      !std::equal(kind.begin(), kind.end(), header.data + 8)) {
    throw Damaged("its header is another one");
  }
  int runs = 0;
  for (size_t i = 1; i + 1 < chunks.size(); i++) {
    if (chunks[i].type == "IDAT") {
      runs += chunks[i - 1].type != "IDAT";
    } else if (!is_harmless(chunks[i])) {
      throw Damaged("it has a chunk that may change its pixels");
    }
  }
  if (runs > 1) throw Damaged("its data are interrupted");
}

// -------------------------------------------------------------------------- deflate (RFC 1951)

class BitReader {
 public:
  BitReader(const uint8_t* data, size_t size) : data_(data), size_(size) {}

  // Makes at least 56 bits available; beyond the end they are zeros.
  void fill() {
    if (at_ + 8 <= size_) {
      // Bits beyond the whole bytes that are counted stay in bits_: the next time they are the same.
      bits_ |= little_endian(data_ + at_) << count_;
      at_ += static_cast<size_t>((63 - count_) / 8);
      count_ |= 56;
      return;
    }
    while (count_ < 56) {
      bits_ |= uint64_t{at_ < size_ ? data_[at_] : uint8_t{0}} << count_;
      at_++;
      count_ += 8;
    }
  }
  int count() const { return count_; }
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
  static uint64_t little_endian(const uint8_t* p) {
    uint64_t value = 0;
    for (int i = 0; i < 8; i++) value |= uint64_t{p[i]} << 8 * i;
    return value;
  }

  const uint8_t* data_;
  size_t size_;
  size_t at_ = 0;
  uint64_t bits_ = 0;
  int count_ = 0;
};

// A Huffman code. The usual, short codes are looked up by the next bits; long ones are rare.
class Code {
 public:
  // A code with unused entries is damaged only when such an entry is met.
  void build(const uint8_t* lengths, int num_symbols) {
    count_.fill(0);
    for (int i = 0; i < num_symbols; i++) count_[lengths[i]]++;
    count_[0] = 0;
    std::array<uint32_t, 16> next{};
    std::array<uint32_t, 16> position{};
    uint32_t code = 0;
    for (int length = 1; length <= 15; length++) {
      code = (code + count_[length - 1]) << 1;
      next[length] = code;
      position[length] = position[length - 1] + count_[length - 1];
      if (code + count_[length] > 1u << length) throw Damaged("a Huffman code is impossible");
    }
    table_.fill(0);
    for (int symbol = 0; symbol < num_symbols; symbol++) {
      const int length = lengths[symbol];
      if (length == 0) continue;
      sorted_[position[length]++] = static_cast<uint16_t>(symbol);
      const uint32_t first = reverse(next[length]++, length);
      if (length > kShort) continue;
      const auto entry = static_cast<uint16_t>(symbol << 4 | length);
      for (uint32_t i = first; i < table_.size(); i += 1u << length) table_[i] = entry;
    }
  }
  // Takes at most 15 bits.
  int decode(BitReader& reader) const {
    const uint16_t entry = table_[reader.peek(kShort)];
    if (entry == 0) return decode_long(reader);
    reader.drop(entry & 15);
    return entry >> 4;
  }

 private:
  static constexpr int kShort = 11;  // bits

  // Bit by bit: the codes of a length are successive numbers, above all continued shorter ones.
  int decode_long(BitReader& reader) const {
    const uint32_t bits = reader.peek(15);
    uint32_t code = 0, first = 0, position = 0;
    for (int length = 1; length <= 15; length++) {
      code = code << 1 | (bits >> (length - 1) & 1);
      first <<= 1;
      if (code < first + count_[length]) {
        reader.drop(length);
        return sorted_[position + code - first];
      }
      first += count_[length];
      position += count_[length];
    }
    throw Damaged("its compressed data have an unknown code");
  }
  static uint32_t reverse(uint32_t code, int length) {
    uint32_t reversed = 0;
    for (int i = 0; i < length; i++) reversed |= (code >> i & 1) << (length - 1 - i);
    return reversed;
  }
  std::array<uint16_t, 1 << kShort> table_;  // symbol * 16 + length of the code; 0: not a short one
  std::array<uint16_t, 288> sorted_;         // symbols in the order of their codes
  std::array<uint32_t, 16> count_;           // codes of each length
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
size_t inflate_block(
    BitReader& shared_reader, const Codes& codes, uint8_t* out, size_t at, size_t size) {
  constexpr std::array<uint16_t, 29> length_base = {
      3,  4,  5,  6,  7,  8,  9,  10, 11,  13,  15,  17,  19,  23, 27,
      31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258};
  constexpr std::array<uint8_t, 29> length_bits = {
      0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0};
  constexpr std::array<uint16_t, 30> distance_base = {
      1,   2,   3,   4,   5,   7,    9,    13,   17,   25,   33,   49,   65,    97,    129,
      193, 257, 385, 513, 769, 1025, 1537, 2049, 3073, 4097, 6145, 8193, 12289, 16385, 24577};
  BitReader reader = shared_reader;  // of its own, which writing bytes cannot change
  while (true) {
    if (reader.count() < 48) reader.fill();  // two codes and their extra bits
    const int symbol = codes.literals.decode(reader);
    if (symbol == 256) break;
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
    copy_match(out + at, distance, length);
    at += length;
    reader.check_end();
  }
  shared_reader = reader;
  return at;
}

size_t inflate_stored(BitReader& reader, uint8_t* out, size_t at, size_t size) {
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
        at = inflate_stored(reader, out.data(), at, size);
        break;
      case 1: {
        static const Codes fixed = fixed_codes();
        at = inflate_block(reader, fixed, out.data(), at, size);
        break;
      }
      case 2:
        at = inflate_block(reader, read_codes(reader), out.data(), at, size);
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

// The three colours of the left pixel stay in registers: reading back what has just been written
// would wait for it.
void undo_average(uint8_t* row, const uint8_t* above, size_t size) {
  std::array<uint8_t, kPixel> left{};
  for (size_t i = 0; i < size; i += kPixel) {
    for (size_t k = 0; k < kPixel; k++) {
      left[k] = static_cast<uint8_t>(row[i + k] + (left[k] + above[i + k]) / 2);
      row[i + k] = left[k];
    }
  }
}

int select(bool condition, int yes, int no) {
  return no ^ ((no ^ yes) & -static_cast<int>(condition));
}

// The neighbour that left + up - corner is nearest to; of equally near ones the first of left, up,
// corner. Without jumps, which in noise would be guessed wrong.
int paeth(int left, int up, int corner) {
  const int to_left = std::abs(up - corner);
  const int to_up = std::abs(left - corner);
  const int to_corner = std::abs(left + up - 2 * corner);
  const int up_or_corner = select(to_up <= to_corner, up, corner);
  return select((to_left <= to_up) & (to_left <= to_corner), left, up_or_corner);
}

void undo_paeth(uint8_t* row, const uint8_t* above, size_t size) {
  std::array<int, kPixel> left{}, corner{};
  for (size_t i = 0; i < size;) {
    // Where left and corner are equal the prediction is the pixel above. With a residual of zero
    // that holds for the next pixel too, so that runs of zeros are copies of the row above.
    if (left == corner) {
      const size_t zeros = zero_run(row + i, size - i);
      std::memcpy(row + i, above + i, zeros);
      i += zeros;
      if (i >= size) break;
      if (zeros) {
        for (size_t k = 0; k < kPixel; k++) left[k] = corner[k] = above[i - kPixel + k];
      }
    }
    for (size_t k = 0; k < kPixel; k++) {
      const int up = above[i + k];
      left[k] = (row[i + k] + paeth(left[k], up, corner[k])) & 255;
      corner[k] = up;
      row[i + k] = static_cast<uint8_t>(left[k]);
    }
    i += kPixel;
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

// The rows of an image with their filters undone; a row is its filter's byte and the pixels.
Bytes decode_rows(const std::vector<Chunk>& chunks, size_t height, size_t width) {
  const size_t row_size = kPixel * width;
  Bytes rows = inflate(join_data(chunks), height * (row_size + 1));
  const Bytes nothing(row_size);
  const uint8_t* above = nothing.data();
  for (size_t y = 0; y < height; y++) {
    uint8_t* row = rows.data() + y * (row_size + 1) + 1;
    undo_filter(row[-1], row, above, row_size);
    above = row;
  }
  return rows;
}

}  // namespace

void decode_panoptic_png(
    const uint8_t* png, size_t png_size, uint32_t* ids, size_t height, size_t width) {
  const Bytes rows = decode_rows(read_chunks(png, png_size), height, width);
  for (size_t y = 0; y < height; y++) {
    const uint8_t* p = rows.data() + y * (kPixel * width + 1) + 1;
    for (size_t x = 0; x < width; x++, p += kPixel) {
      *ids++ = uint32_t{p[0]} | uint32_t{p[1]} << 8 | uint32_t{p[2]} << 16;
    }
  }
}

void decode_plain_png(
    const uint8_t* png, size_t png_size, uint8_t* pixels, size_t height, size_t width, bool bgr) {
  const std::vector<Chunk> chunks = read_chunks(png, png_size);
  require_plain(chunks, height, width);
  const Bytes rows = decode_rows(chunks, height, width);
  const size_t first = bgr ? 2 : 0;
  for (size_t y = 0; y < height; y++) {
    const uint8_t* p = rows.data() + y * (kPixel * width + 1) + 1;
    for (size_t x = 0; x < width; x++, p += kPixel, pixels += kPixel) {
      pixels[0] = p[first];
      pixels[1] = p[1];
      pixels[2] = p[2 - first];
    }
  }
}

}  // namespace psf
