// What all parts of the null GPU share: the counters, and whether a call may be made while a graph is captured.
#pragma once
#include <driver_types.h>

// In the order of KINDS in __init__.py.
enum kind { LAUNCHES, GEMMS, MEMSETS, H2D, D2H, D2D, PAGEABLE, COLLECTIVES, SYNCS, MALLOCS, GRAPHS, NODES, NUM_KINDS };

// Counts one piece of work given to a stream: a node of the graph where the stream is captured.
void null_count(enum kind kind, cudaStream_t stream);
// Error of a call that waits for a stream: none may while it is captured.
cudaError_t null_wait(cudaStream_t stream);

// Functions that do nothing, successfully. Arguments that nobody reads need no names in C's calling conventions.
#define SUCCEEDS(name)                                                                                                 \
  int name(void) { return 0; }
