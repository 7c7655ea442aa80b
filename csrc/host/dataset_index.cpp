// Index builders for token datasets: where each training sample starts, and the order of samples and documents.
// fused_megatron/reference/sample_index.py defines the results; both give the same bits.
//
// A plain C interface, which fused_megatron/data/compiled_index.py calls by ctypes: the library needs neither Python's
// headers nor torch, so that one file serves every version of Python. The caller checks single numbers and allocates
// the results; this file checks what is in the arrays. Each function returns 0, or the kind of its error with a message.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#define FM_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

enum Error : int { kNone = 0, kInvalid = 1, kOutOfMemory = 2, kBug = 3 };

// Runs the body; no exception may leave a C function.
template <typename Body>
int guarded(char* message, int64_t capacity, Body body) {
    const auto fail = [&](Error kind, const char* text) {
        std::snprintf(message, static_cast<size_t>(capacity), "%s", text);
        return static_cast<int>(kind);
    };
    try {
        body();
        return kNone;
    } catch (const std::invalid_argument& error) {
        return fail(kInvalid, error.what());
    } catch (const std::bad_alloc& error) {
        return fail(kOutOfMemory, error.what());
    } catch (const std::exception& error) {
        return fail(kBug, error.what());
    }
}

// The output function of splitmix64: a bijection of 64-bit words.
uint64_t mix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

constexpr uint64_t kGoldenGamma = 0x9E3779B97F4A7C15ull;

// Leaves room for every sum below in 64 bits.
constexpr int64_t kMaxTokens = int64_t{1} << 62;

struct KeyedIndex {
    uint64_t key;
    int64_t index;
};

// Checks lengths and order, on which all code below relies, and returns the sum of the lengths in that order.
int64_t checked_total(const int64_t* lengths, int64_t num_documents, const int64_t* order, int64_t num_ordered) {
    int64_t total = 0;
    for (int64_t p = 0; p < num_ordered; ++p) {
        const int64_t document = order[p];
        if (document < 0 || document >= num_documents) {
            throw std::invalid_argument("order[" + std::to_string(p) + "]=" + std::to_string(document) +
                                        " must be a document in [0, " + std::to_string(num_documents) + ")");
        }
        const int64_t length = lengths[document];
        if (length < 0 || length > kMaxTokens - total) {
            throw std::invalid_argument("lengths[" + std::to_string(document) + "]=" + std::to_string(length) +
                                        " must not be negative, nor the sum of lengths pass 2^62");
        }
        total += length;
    }
    return total;
}

}  // namespace

// out: int64 [count].
FM_EXPORT int dataset_index_permutation(int64_t count, uint64_t seed, uint64_t epoch, uint64_t stream, int64_t* out,
                                        char* message, int64_t capacity) {
    return guarded(message, capacity, [&] {
        const uint64_t base = mix(mix(mix(seed + kGoldenGamma) + epoch + kGoldenGamma) + stream + kGoldenGamma);
        std::vector<KeyedIndex> keyed(static_cast<size_t>(count));
        // mix is a bijection and gamma is odd, so no two keys are equal: any sort gives the same order.
        for (int64_t i = 0; i < count; ++i) {
            keyed[i] = {mix(base + static_cast<uint64_t>(i + 1) * kGoldenGamma), i};
        }
        std::sort(keyed.begin(), keyed.end(), [](const KeyedIndex& a, const KeyedIndex& b) { return a.key < b.key; });
        for (int64_t i = 0; i < count; ++i) out[i] = keyed[i].index;
    });
}

// Checks the arrays and stores the number of rows that dataset_index_samples fills.
FM_EXPORT int dataset_index_num_rows(const int64_t* lengths, int64_t num_documents, const int64_t* order,
                                     int64_t num_ordered, int64_t seq_len, int64_t* num_rows, char* message,
                                     int64_t capacity) {
    return guarded(message, capacity, [&] {
        const int64_t total = checked_total(lengths, num_documents, order, num_ordered);
        // A sample needs one token more than seq_len; the next sample begins with this token.
        *num_rows = total > 0 ? (total - 1) / seq_len + 1 : 0;
    });
}

// Row i of out, int64 [num_rows, 2]: the position in `order` of the document that holds token i * seq_len of the
// concatenation, and the token's offset in that document.
FM_EXPORT int dataset_index_samples(const int64_t* lengths, int64_t num_documents, const int64_t* order,
                                    int64_t num_ordered, int64_t seq_len, int64_t num_rows, int64_t* out, char* message,
                                    int64_t capacity) {
    return guarded(message, capacity, [&] {
        int64_t row = 0;
        int64_t skip = 0;  // tokens between the start of the document at position p and the next sample
        for (int64_t p = 0; p < num_ordered && row < num_rows; ++p) {
            const int64_t document = order[p];
            if (document < 0 || document >= num_documents) break;
            const int64_t length = lengths[document];
            for (; row < num_rows && skip < length; ++row, skip += seq_len) {
                out[2 * row] = p;
                out[2 * row + 1] = skip;
            }
            skip -= length;
        }
        if (row != num_rows) throw std::logic_error("the lengths changed while the sample index was built");
    });
}
