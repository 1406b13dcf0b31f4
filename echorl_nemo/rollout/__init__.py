"""Who generates: the record of rollouts, the protocol of engines, sampling."""
