/*
 * Connections: who has a packet's connection, the server or the ECS agent, and who is to have a new
 * one.
 */
#ifndef CONNECTIONS_H
#define CONNECTIONS_H

#include "metad.h"
#include "packet.h"

/* connection returns the state of the sender's connection to addr:dport in the namespace; 0: there
 * is none. */
static __always_inline int connection(struct __sk_buff *skb, const struct sender *s, __be32 addr,
				      __be16 dport, __u64 netns)
{
	struct bpf_sock_tuple tuple = {
	    .ipv4 = {.saddr = s->addr, .sport = s->sport, .daddr = addr, .dport = dport},
	};
	struct bpf_sock *sk = bpf_skc_lookup_tcp(skb, &tuple, sizeof(tuple.ipv4), netns, 0);
	int state;

	if (!sk)
		return 0;
	state = sk->state;
	bpf_sk_release(sk);
	return state == BPF_TCP_LISTEN ? 0 : state;
}

/* is_agents returns whether the agent has the packet's connection and the server does not have it.
 * A connection that the agent accepted while metad was away stays the agent's: the server would
 * reset it. A packet that belongs to neither goes to the server, whose TCP stack resets it: the
 * client fails at once. A connection in TIME_WAIT at the agent counts only for its last FIN,
 * because the client may use the TCP port again. */
static __always_inline int is_agents(struct __sk_buff *skb, const struct sender *s)
{
	int state;

	if (s->syn || !s->sport || !agent_dport)
		return 0;
	state = connection(skb, s, agent_addr, agent_dport, BPF_F_CURRENT_NETNS);
	if (!state || (state == BPF_TCP_TIME_WAIT && !s->fin))
		return 0;
	return !connection(skb, s, META_ADDR, META_DPORT, server_netns);
}

/* is_left says whether an unknown sender opens a connection that is to be the agent's. Where no
 * rule leads to the agent, metad_host refuses it. */
static __always_inline int is_left(const struct sender *s)
{
	return s->syn && agent_dport && bpf_map_lookup_elem(&left_alone, &s->addr);
}

/* is_busy returns whether the packet opens a connection that the server would refuse. The client
 * repeats its SYN after a second. */
static __always_inline int is_busy(const struct sender *s, __u32 tag)
{
	__u64 *until = s->syn ? bpf_map_lookup_elem(&busy, &tag) : NULL;

	return until && *until > bpf_ktime_get_ns();
}

/* handshake_of returns the entry for the sender's connection. Another connection may be in it, of a
 * device that shares the group. */
static __always_inline struct handshake *handshake_of(struct __sk_buff *skb, const struct sender *s)
{
	__u32 key = (s->addr ^ s->sport) * 0x9e3779b1; /* 2^32 by the golden ratio: spreads them */

	key = (key ^ key >> 16) % HANDSHAKES_OF_A_GROUP;
	key = (skb->ifindex * HANDSHAKES_OF_A_GROUP + key) % HANDSHAKES;
	return bpf_map_lookup_elem(&handshakes, &key);
}

/* is_servers returns whether the packet is of a connection that the server has, and the agent does
 * not have by now. A connection in TIME_WAIT does not count, because the client may use the TCP
 * port again. What comes from another port or MAC than those of the address's task is not of it. */
static __always_inline int is_servers(struct __sk_buff *skb, const struct sender *s, enum slot slot)
{
	struct task_value *t;
	int state;

	if (s->syn || !s->sport)
		return 0;
	state = connection(skb, s, META_ADDR, META_DPORT, server_netns);
	if (!state || state == BPF_TCP_TIME_WAIT)
		return 0;
	state = agent_dport ? connection(skb, s, agent_addr, agent_dport, BPF_F_CURRENT_NETNS) : 0;
	if (state && state != BPF_TCP_TIME_WAIT)
		return 0;
	t = bpf_map_lookup_elem(&ip_task, &s->addr);
	if (!t)
		return 1;
	return same_mac(t->mac, s->mac) && (slot == SLOT_BRIDGE || t->ifindex == skb->ifindex);
}

#endif
