#include "kept.h"

#include <iterator>
#include <list>
#include <mutex>
#include <utility>

namespace fusedrnn {
namespace {

struct Entry {
  KeptWeights::Key key;
  Memory block;
};

// Blocks that no call uses at present, the one used last in front. Locks are only tried: a child forked while another
// thread held one goes without.
struct {
  std::mutex mutex;
  std::list<Entry> entries;
  size_t bytes = 0;
} kept;

Memory take(std::list<Entry>::iterator entry) {
  const Memory block = entry->block;
  kept.bytes -= block.bytes;
  kept.entries.erase(entry);
  return block;
}

// The block of a key, if there is one. Needs the lock.
Memory find(const KeptWeights::Key& key) {
  for (auto entry = kept.entries.begin(); entry != kept.entries.end(); ++entry)
    if (entry->key == key) return take(entry);
  return {};
}

}  // namespace

bool KeptWeights::Key::operator==(const Key& other) const {
  return w_ih == other.w_ih && w_hh == other.w_hh && gates == other.gates && I == other.I && H == other.H &&
         R == other.R && directions == other.directions && input_vectors == other.input_vectors &&
         vectors == other.vectors && shares == other.shares && copies == other.copies && twice == other.twice &&
         vector_bytes == other.vector_bytes && value_bytes == other.value_bytes && projected == other.projected &&
         merged == other.merged && together == other.together;
}

KeptWeights::KeptWeights(const Key& key, size_t bytes) : key_(key) {
  if (const std::unique_lock<std::mutex> lock(kept.mutex, std::try_to_lock); lock) block_ = find(key);
  new_ = !block_.data;
  if (new_) block_ = allocate(bytes);
}

KeptWeights::~KeptWeights() { release(block_); }

void KeptWeights::keep() {
  const std::unique_lock<std::mutex> lock(kept.mutex, std::try_to_lock);
  if (!lock) return;
  release(find(key_));  // another call with these weights ended before
  kept.entries.push_front({key_, std::exchange(block_, {})});
  kept.bytes += kept.entries.front().block.bytes;
  while (kept.bytes > kept_limit()) release(take(std::prev(kept.entries.end())));
}

}  // namespace fusedrnn
