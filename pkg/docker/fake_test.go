package docker

import (
	"testing"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest"
)

func testLog(t testing.TB) *zap.Logger { return zaptest.NewLogger(t) }

// fakeEngine answers nothing.
type fakeEngine struct{ Engine }
