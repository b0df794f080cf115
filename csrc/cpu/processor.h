// What an instruction set does not tell of the processor.
#pragma once

namespace fusedrnn {

// Whether vectors of 512 bits are multiplied as fast as shorter ones. Zen 4 takes two turns for each; there arithmetic
// is half as fast beside caches of about the same speed (an L2 of 64 bytes a cycle, 100 to 120 GB/s of a core's L3).
bool multiplies_512_bits();

}  // namespace fusedrnn
