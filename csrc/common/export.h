// Everything is hidden by default; what another library of ours links against is marked.
#pragma once

#define FASTCLUST_API __attribute__((visibility("default")))
