// One row's residual in 8 bits, with what the filter must know of each eighth of its features.
#pragma once

#include "knn/int8_filter.h"

#if defined(__AVX512VNNI__)

#include <cmath>
#include <cstdint>

#include "knn/staged_tile.h"

namespace fastclust::knn::FASTCLUST_CAPABILITY {

struct ResidualCode {
    static constexpr int kParts = Stages::kMost;

    // Of each part:
    float squares[kParts];  // |e|^2
    float coded[kParts];    // |e~|^2
    float rest[kParts];     // |e - e~|^2
    int32_t sums[kParts];   // of the codes

    /// Where the part begins, in words of four features; parts are whole sixteens of features.
    static int64_t begin(int part, int64_t words) { return part == kParts ? words : words * part / kParts / 4 * 4; }

    /// `e` is padded with zeros to whole sixteens of features, `words` (zeroed beyond them) becomes the codes.
    ResidualCode(const float* e, int64_t depth, float step, int64_t word_count, uint32_t* words) {
        typedef float Lanes __attribute__((vector_size(64)));
        typedef float Floats __attribute__((vector_size(64), aligned(4), may_alias));
        typedef int32_t Ints __attribute__((vector_size(64)));
        typedef signed char Bytes __attribute__((vector_size(16)));
        constexpr float kRound = 12582912;  // 1.5 * 2^23: adding it leaves no fraction
        const float inverse = 1 / step;
        const int64_t padded = (depth + 15) / 16 * 4;
        for (int64_t w = padded; w < word_count; ++w) words[w] = 0;
        for (int part = 0; part < kParts; ++part) {
            Lanes square = {}, coded_square = {}, rest_square = {};
            Ints sum = {};
            const int64_t end = part + 1 < kParts ? begin(part + 1, word_count) : padded;
            for (int64_t w = begin(part, word_count); w < end; w += 4) {
                const Lanes value = *reinterpret_cast<const Floats*>(e + 4 * w);
                Lanes code = (value * inverse + kRound) - kRound;
                code = code > kMostCode ? Lanes{} + kMostCode : code < -kMostCode ? Lanes{} - kMostCode : code;
                const Lanes coded_value = code * step, left = value - coded_value;
                square += value * value;
                coded_square += coded_value * coded_value;
                rest_square += left * left;
                const Ints integers = __builtin_convertvector(code, Ints);
                sum += integers;
                const Bytes bytes = __builtin_convertvector(integers, Bytes);
                const int64_t here = w + 4 < word_count ? 4 : word_count - w;
                __builtin_memcpy(words + w, &bytes, static_cast<size_t>(here) * 4);
            }
            squares[part] = quantised::lanes::sum(square);
            coded[part] = quantised::lanes::sum(coded_square);
            rest[part] = quantised::lanes::sum(rest_square);
            sums[part] = quantised::lanes::sum(sum);
        }
    }
};

}  // namespace fastclust::knn::FASTCLUST_CAPABILITY

#endif
