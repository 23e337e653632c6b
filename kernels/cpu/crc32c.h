// CRC32C (Castagnoli polynomial 0x1EDC6F41, reflected), in hardware where the processor has the instruction.
//
// Source of the algorithm: RFC 3720, appendix B.4; test vectors from there are in tests/kernels. The state that runs
// through `crc32c_update` is the inverted one, as the instruction wants it; `crc32c` inverts at both ends, so that
// crc32c(b, crc32c(a)) == crc32c(a + b).
#pragma once

#include <cstddef>
#include <cstdint>

namespace tierstore {

// Says which implementation runs on this processor: "sse4.2", "armv8-crc" or "table".
const char* crc32c_backend();

uint32_t crc32c(const uint8_t* data, size_t num_bytes, uint32_t seed);

}  // namespace tierstore
