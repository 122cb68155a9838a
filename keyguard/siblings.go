package keyguard

import (
	"context"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// siblingsEvery is how often the other keys of a multi-Region set are asked about
// while the own one is refused. It only informs: half a minute is soon enough.
const siblingsEvery = 30 * time.Second

// askSiblings finds out whether data that is frozen here can still be decrypted
// under another key of the same multi-Region set, for the owner will want to know.
// It decides nothing: a guard never turns to another key.
func (r *runner) askSiblings() {
	kms, able := r.kms.(SiblingDescriber)
	now := r.o.Clock.Boot()
	if !able || r.m.gate.Admits() || !r.m.state.refuses() || len(r.desc.Replicas) == 0 || now-r.siblingsAsked < siblingsEvery {
		return
	}
	r.siblingsAsked = now
	siblings := r.desc.Replicas
	r.wg.Go(func() {
		ctx, cancel := context.WithTimeout(r.calls, probeTimeout)
		defer cancel()
		var enabled []string
		for _, arn := range siblings {
			if d, err := kms.DescribeSibling(ctx, arn); err == nil && d.State == Enabled {
				enabled = append(enabled, arn)
			}
		}
		r.send(event{kind: eventSiblings, enabled: enabled})
	})
}

// rotated tells of new key material, which a description shows. KMS finds the
// material of each ciphertext itself, so that nothing else happens.
func (r *runner) rotated(d Description) {
	was := r.desc.KeyMaterialID
	if was == "" || d.KeyMaterialID == "" || d.KeyMaterialID == was {
		return
	}
	r.audit(AuditRecord{Event: AuditRotate, RequestID: d.RequestID, Detail: "key material " + was + " → " + d.KeyMaterialID})
	r.logLater(zapcore.InfoLevel, "KMS has rotated the key; data written before stays readable",
		zap.String("material_before", was), zap.String("material", d.KeyMaterialID), zap.String("request_id", d.RequestID))
}
