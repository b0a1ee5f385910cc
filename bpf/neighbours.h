/*
 * Neighbours: where the senders are that no task is known for, for the way back.
 */
#ifndef NEIGHBOURS_H
#define NEIGHBOURS_H

#include "metad.h"
#include "packet.h"

/* How long an address without a task stays with the MAC that used it last at a bridge device. Long
 * enough for an answer on its way, short enough for an address that moved. */
#define NEIGHBOUR_HOLD_NS (10ULL * 1000 * 1000 * 1000)

/* place_of returns the key of port_neighbours for the address on the port. */
static __always_inline struct neighbour_place place_of(__be32 addr, __u32 ifindex)
{
	return (struct neighbour_place){ifindex, bpf_ntohl(addr) % NEIGHBOURS_OF_A_PORT};
}

/* neighbour_of returns where the client of a connection with the tag is: on the tag's port and no
 * other, or at a bridge device. NULL: it is not known. */
static __always_inline struct neighbour *neighbour_of(__be32 addr, __u32 tag)
{
	struct neighbour_place place = place_of(addr, tag & ~TAG_PORT);
	struct neighbour *n;

	if (!(tag & TAG_PORT))
		return bpf_map_lookup_elem(&neighbours, &addr);
	n = bpf_map_lookup_elem(&port_neighbours, &place);
	return n && !__builtin_memcmp(&n->addr, &addr, sizeof(addr)) ? n : NULL;
}

/* learn_port stores the MAC of a sender without a task, for the way back. The port is a proof,
 * whatever else uses the address: what came in by a port is answered by that port. */
static __always_inline void learn_port(struct __sk_buff *skb, const struct sender *s, __u32 tag)
{
	struct neighbour_place place = place_of(s->addr, skb->ifindex);
	struct neighbour *had = neighbour_of(s->addr, tag);
	struct neighbour n = {.tag = tag, .ifindex = skb->ifindex};

	if (had && same_mac(had->mac, s->mac))
		return;
	__builtin_memcpy(n.mac, s->mac, ETH_ALEN);
	__builtin_memcpy(&n.addr, &s->addr, sizeof(n.addr));
	bpf_map_update_elem(&port_neighbours, &place, &n, BPF_ANY);
}

/* learn_bridge stores where a sender without a task is that only a bridge device has seen. It does
 * not move an address that is in use: a container that claims its neighbour's address would get the
 * neighbour's answers. Returns 0 if the packet may go on. */
static __always_inline int learn_bridge(struct __sk_buff *skb, const struct sender *s)
{
	struct neighbour *had = bpf_map_lookup_elem(&neighbours, &s->addr);
	struct neighbour n = {
	    .tag = TAG_NONE,
	    .ifindex = skb->ifindex,
	    .seen_ns = bpf_ktime_get_ns(),
	};

	if (had) {
		if (had->ifindex == skb->ifindex && same_mac(had->mac, s->mac)) {
			had->seen_ns = n.seen_ns;
			return 0;
		}
		if (n.seen_ns - had->seen_ns < NEIGHBOUR_HOLD_NS)
			return -1;
	}
	__builtin_memcpy(n.mac, s->mac, ETH_ALEN);
	__builtin_memcpy(&n.addr, &s->addr, sizeof(n.addr));
	bpf_map_update_elem(&neighbours, &s->addr, &n, BPF_ANY);
	return 0;
}

#endif
