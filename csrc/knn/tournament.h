// Every two of some players meet once, in rounds in which nobody plays twice: so no two threads touch one player.
#pragma once

#include <cstdint>

#include "common/parallel.h"

namespace fastclust::knn::FASTCLUST_CAPABILITY {

/// A thread's worker is what make_worker() returns; meet(worker, a, b) is called for each two of [0, count), after_round(r)
/// when all that meet in round r have met.
template <class MakeWorker, class Meet, class AfterRound>
inline void play_tournament(int64_t count, const MakeWorker& make_worker, const Meet& meet, const AfterRound& after_round) {
    const int64_t players = count + count % 2;  // with an odd number, whoever meets the last one rests
    for (int64_t round = 0; round + 1 < players; ++round) {
        parallel_for(0, players / 2, 1, [&](int64_t begin, int64_t end) {
            auto worker = make_worker();
            for (int64_t pair = begin; pair < end; ++pair) {
                const int64_t a = pair == 0 ? players - 1 : (round + pair) % (players - 1);
                const int64_t b = (round + players - 1 - pair) % (players - 1);
                if (a < count && b < count) meet(worker, a, b);
            }
        });
        after_round(round);
    }
}

}  // namespace fastclust::knn::FASTCLUST_CAPABILITY
