// What an instruction set does not tell of the processor.
#pragma once

namespace fusedrnn {

// Whether vectors of 512 bits are multiplied as fast as shorter ones. Zen 4 takes two turns for each: a core makes 118
// GF/s in float32, not the 269 of Zen 5, beside a third-level cache of about the same speed (100 and 115 GB/s).
bool multiplies_512_bits();

// Whether the second-level cache delivers what it has delivered not long ago slower than what it has not: Zen 5 makes
// 190 GB/s of what comes again after less than 384 KB, 250 of what comes after more than 448 KB. Whatever the hints of
// the fetches; with copies that are read by turns it is fast as well.
bool rereads_slowly();

}  // namespace fusedrnn
