// Index builders for token datasets: where each training sample starts, and the order of samples and documents.
// fused_megatron/reference/sample_index.py defines the results; both give the same bits.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace py = pybind11;

namespace {

// Contiguous and int64, without a conversion that could silently change values.
using Int64Array = py::array_t<int64_t, py::array::c_style>;

// The output function of splitmix64: a bijection of 64-bit words.
uint64_t mix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

constexpr uint64_t kGoldenGamma = 0x9E3779B97F4A7C15ull;

// Limits that leave room for every sum below in 64 bits.
constexpr int64_t kMaxTokens = int64_t{1} << 62;
constexpr int64_t kMaxSeqLen = int64_t{1} << 31;

struct KeyedIndex {
    uint64_t key;
    int64_t index;
};

Int64Array permutation(int64_t count, uint64_t seed, uint64_t epoch, uint64_t stream) {
    if (count < 0) throw std::invalid_argument("count=" + std::to_string(count) + " must not be negative");
    Int64Array result(count);
    int64_t* out = result.mutable_data();
    {
        py::gil_scoped_release release;
        const uint64_t base = mix(mix(mix(seed + kGoldenGamma) + epoch + kGoldenGamma) + stream + kGoldenGamma);
        std::vector<KeyedIndex> keyed(static_cast<size_t>(count));
        // mix is a bijection and gamma is odd, so no two keys are equal: any sort gives the same order.
        for (int64_t i = 0; i < count; ++i) {
            keyed[i] = {mix(base + static_cast<uint64_t>(i + 1) * kGoldenGamma), i};
        }
        std::sort(keyed.begin(), keyed.end(), [](const KeyedIndex& a, const KeyedIndex& b) { return a.key < b.key; });
        for (int64_t i = 0; i < count; ++i) out[i] = keyed[i].index;
    }
    return result;
}

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

// Row i: the position in `order` of the document that holds token i * seq_len of the concatenation, and the token's
// offset in that document.
Int64Array build_sample_index(const Int64Array& lengths, const Int64Array& order, int64_t seq_len) {
    if (lengths.ndim() != 1 || order.ndim() != 1) {
        throw std::invalid_argument("lengths and order must have one dimension");
    }
    if (seq_len < 1 || seq_len > kMaxSeqLen) {
        throw std::invalid_argument("seq_len=" + std::to_string(seq_len) + " must be in [1, 2^31]");
    }
    const int64_t* length_of = lengths.data();
    const int64_t* order_of = order.data();
    const int64_t num_ordered = order.shape(0);
    int64_t total = 0;
    {
        py::gil_scoped_release release;
        total = checked_total(length_of, lengths.shape(0), order_of, num_ordered);
    }
    // A sample needs one token more than seq_len; the next sample begins with this token.
    const int64_t num_samples = total > 0 ? (total - 1) / seq_len : 0;
    const int64_t num_rows = total > 0 ? num_samples + 1 : 0;
    Int64Array result({num_rows, static_cast<int64_t>(2)});
    int64_t* out = result.mutable_data();
    {
        py::gil_scoped_release release;
        int64_t row = 0;
        int64_t skip = 0;  // tokens between the start of the document at position p and the next sample
        for (int64_t p = 0; p < num_ordered && row < num_rows; ++p) {
            const int64_t length = length_of[order_of[p]];
            for (; row < num_rows && skip < length; ++row, skip += seq_len) {
                out[2 * row] = p;
                out[2 * row + 1] = skip;
            }
            skip -= length;
        }
        if (row != num_rows) throw std::logic_error("the lengths changed while the sample index was built");
    }
    return result;
}

}  // namespace

PYBIND11_MODULE(_dataset_index, m) {
    m.doc() = "Index builders for token datasets; see fused_megatron.reference.sample_index for what they compute.";
    m.def("permutation", &permutation, py::arg("count"), py::arg("seed"), py::arg("epoch"), py::arg("stream"));
    m.def("build_sample_index", &build_sample_index, py::arg("lengths").noconvert(), py::arg("order").noconvert(),
          py::arg("seq_len"));
}
