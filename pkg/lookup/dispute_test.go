package lookup

import (
	"testing"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
)

// A task keeps its address, as long as it claims it from its port, whoever else claims it, wherever
// the other stands in the list, and after a restart. The other is counted and named once, and keeps
// what nobody else claims.
func TestIncumbentKeepsItsAddress(t *testing.T) {
	core, logs := observer.New(zapcore.WarnLevel)
	k := newFakeKernel()
	table := New(k, zap.New(core))
	victim, thief := newTask("victim", endpoint(2, 12)), newTask("thief", endpoint(3, 13),
		endpoint(2, 13))
	second := newTask("second", endpoint(2, 14))
	check := func() {
		t.Helper()
		if v := table.Resolve(portTag(12), addr(2)); v == nil || v.Task != victim {
			t.Error("the victim is not answered any more, though its port proves it")
		}
		if got := k.m[addr(2)].Ifindex; got != 12 {
			t.Errorf("the kernel has ifindex %d at the address, want 12", got)
		}
		if v := table.Resolve(portTag(13), addr(2)); v != nil {
			t.Errorf("the thief is answered as %s by the address", v.Task.ID)
		}
		if v := table.Resolve(portTag(13), addr(3)); v == nil || v.Task != thief {
			t.Error("the thief has lost its own address")
		}
	}
	apply(t, table, victim)
	apply(t, table, victim, thief)
	check()
	apply(t, table, thief, second, victim)
	check()
	if table.Conflicts() != 1 || logs.Len() != 1 ||
		logs.All()[0].ContextMap()["claimedBy"] != thief.ARN {
		t.Errorf("got %d conflicts and %v, want one that names the thief",
			table.Conflicts(), logs.All())
	}
	saved := []Saved{{table.Views()[2].Tag, victim}}
	table = New(k, zap.NewNop())
	if err := table.Restore(saved); err != nil {
		t.Fatal(err)
	}
	apply(t, table, thief, victim, second)
	check()
	// What the port does not prove any more, it does not keep.
	if err := table.PortGone(12); err != nil {
		t.Fatal(err)
	}
	apply(t, table, victim, second)
	if v := table.Resolve(portTag(14), addr(2)); v == nil || v.Task != second {
		t.Error("the address's next task does not get it")
	}
}
