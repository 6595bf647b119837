// Float scores of a block's rows with single centroids, for what 8-bit products leave undecided.
#pragma once

#include "kmeans/codes.h"

namespace fastclust::kmeans::FASTCLUST_CAPABILITY {

#if defined(__AVX512VNNI__)

/// Of one block at a time, whose rows are its lanes.
class FloatScores {
   public:
    FloatScores(int64_t d, const Context& context) : centred_(context.scratch<float>(kBlockRows * padded_depth(d))) {
        for (int64_t i = 0; i < kBlockRows * padded_depth(d); ++i) centred_[i] = 0;
    }

    /// Makes a row the block's lane i.
    void fetch(int64_t i, const QuantisedCentres& centres, const QuantisedRows& data, const float* x, int64_t row) {
        vectors_[i] = data.vector(x, row);
        if (data.sorted == nullptr) vectors_[i] = centre(vectors_[i], centres, i);
    }

    /// |c|^2 - 2 x.c of lane i.
    float score(const QuantisedCentres& centres, int64_t i, int64_t column) const {
        const int64_t width = padded_depth(centres.d);
        const float *v = vectors_[i], *w = centres.row(column);
        __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
        int64_t j = 0;
        for (; j + 32 <= width; j += 32) {
            even = _mm512_fmadd_ps(_mm512_loadu_ps(v + j), _mm512_loadu_ps(w + j), even);
            odd = _mm512_fmadd_ps(_mm512_loadu_ps(v + j + 16), _mm512_loadu_ps(w + j + 16), odd);
        }
        if (j < width) even = _mm512_fmadd_ps(_mm512_loadu_ps(v + j), _mm512_loadu_ps(w + j), even);
        return centres.squares[column] - 2 * _mm512_reduce_add_ps(_mm512_add_ps(even, odd));
    }

   private:
    const float* centre(const float* __restrict x, const QuantisedCentres& centres, int64_t i) {
        const float* __restrict shift = centres.shift;
        float* __restrict v = centred_ + i * padded_depth(centres.d);
        for (int64_t j = 0; j < centres.d; ++j) v[j] = x[j] - shift[j];
        return v;
    }

    float* centred_;                    // (kBlockRows, padded D) such rows as are not kept less the shift
    const float* vectors_[kBlockRows];  // the rows less the shift
};

#endif

}  // namespace fastclust::kmeans::FASTCLUST_CAPABILITY
