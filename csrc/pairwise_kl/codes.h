// 8-bit codes of p and log p, whose products decide most pairs. Included by batch.h alone.
//
// With l' = log p less its mean, p_i . log p_j = p_i . l'_j + mean_j sum_k p_ik, and with q the codes
//     |p_i . l'_j - scale_i scale_j q_i . q_j|  <=  |p_i - p~_i| |l'_j| + sum_k p~_ik max_k |l'_jk - l~_jk|
// (Cauchy-Schwarz for what p loses; what log p loses is at most half a step, and is met by probabilities).
#pragma once

#include <type_traits>

#include "common/context.h"
#include "common/quantised.h"

namespace fastclust::pairwise_kl::FASTCLUST_CAPABILITY {
namespace {

namespace quantised = fastclust::quantised::FASTCLUST_CAPABILITY;

template <class T>
constexpr bool kHasCodes = quantised::kAvailable && std::is_same_v<T, float>;

/// A row of p, the first argument of KL.
struct First {
    float inverse;    // 1 / scale
    float total;      // sum p / scale
    float residual;   // |p - p~|
    float magnitude;  // the greater of sum p and sum p~
};

struct Codes {
    static constexpr int64_t kLeastColumns = 24;  // with fewer, float products are as fast
    static constexpr int kGroup = quantised::group_rows(8);
    static constexpr int64_t kLanes = quantised::kWidth;

    int64_t steps = 0;                // of four columns; 0: no codes
    uint8_t *p, *log_p;               // groups of kGroup rows, and panels of kLanes rows, as common/quantised.h packs them
    First* first;                     // (rows)
    float *scale, *mean;              // (rows) of log p, the second argument
    float *block_norm, *block_error;  // (rows / 64) the greatest |l'| and |l' - l~| of a block
    float* work;                      // (rows / 64, width)

    void allocate(int64_t rows, int64_t k, int64_t width, const Context& context) {
        steps = quantised::steps(k);
        p = context.scratch<uint8_t>(rows * steps * 4);
        log_p = context.scratch<uint8_t>(rows * steps * 4);
        first = context.scratch<First>(rows);
        for (float** values : {&scale, &mean}) *values = context.scratch<float>(rows);
        for (float** values : {&block_norm, &block_error}) *values = context.scratch<float>(rows / 64);
        work = context.scratch<float>(rows / 64 * width);
    }

    const uint8_t* group(int64_t i) const { return p + i * steps * 4; }
    const uint8_t* panel(int64_t i) const { return log_p + i * steps * 4; }

    static float sum(const float* row, int64_t k) {
        quantised::Sums sums = {};
        for (int64_t c = 0; c < k; c += 16) sums += *reinterpret_cast<const quantised::Floats*>(row + c);
        return quantised::lanes::sum(sums);
    }

    /// Row i, padded with zeros to whole sixteens; `work` is as long.
    void fill(int64_t i, const float* row_p, const float* row_log_p, int64_t k, float* work) const {
        uint8_t* to_p = p + i / kGroup * kGroup * steps * 4 + i % kGroup * quantised::row_stride(steps) * 4;
        uint8_t* to_log_p = log_p + i / kLanes * kLanes * steps * 4 + i % kLanes * 4;
        constexpr float kRounding = 1.2e-7F;  // of one float operation
        const float total = sum(row_p, k), log_total = sum(row_log_p, k);
        int32_t codes;
        const float top = quantised::largest_magnitude(row_p, k);
        const auto how =
            quantised::quantise(row_p, k, top > 1e-30F ? top / 255 : 1, 0, to_p, quantised::step_stride(kGroup) * 4, &codes);
        const float magnitude = how.scale * static_cast<float>(codes);
        first[i] = {1 / how.scale, total / how.scale, how.residual, magnitude > total ? magnitude : total};
        mean[i] = k > 0 ? log_total / static_cast<float>(k) : 0;
        for (int64_t c = 0; c < k; ++c) work[c] = row_log_p[c] - mean[i];
        const float largest = quantised::largest_magnitude(work, k);
        const auto log_how = quantised::quantise(work, k, quantised::scale_for(largest), 0, to_log_p, kLanes * 4, &codes);
        scale[i] = log_how.scale;
        const float norm = log_how.norm + log_how.residual;
        const float magnitude_of_log = largest + (mean[i] < 0 ? -mean[i] : mean[i]);
        const float error = 0.5001F * log_how.scale + kRounding * static_cast<float>(k + 16) * magnitude_of_log;
        float &most_norm = block_norm[i / 64], &most_error = block_error[i / 64];
        most_norm = i % 64 == 0 || norm > most_norm ? norm : most_norm;
        most_error = i % 64 == 0 || error > most_error ? error : most_error;
    }
};

}  // namespace
}  // namespace fastclust::pairwise_kl::FASTCLUST_CAPABILITY
