package keyguard

import (
	"context"
	"time"
)

const (
	slowAnswer  = time.Second
	eventBuffer = 64
)

type eventKind uint8

const eventSideCall eventKind = 1

type event struct {
	kind eventKind
	op   string
	err  error
}

// Run TODO
func (g *Guard) Run(ctx context.Context) error { <-ctx.Done(); return nil }
