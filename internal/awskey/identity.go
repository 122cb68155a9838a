package awskey

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awsmiddleware "github.com/aws/aws-sdk-go-v2/aws/middleware"
	"github.com/aws/aws-sdk-go-v2/service/sts"

	"github.com/byokd/byokd/keyguard/awskms"
)

// Identity is who AWS takes us for.
type Identity struct {
	Account string `json:"account"`
	ARN     string `json:"arn"`  // as AWS says it: for a role, that of a session
	Role    string `json:"role"` // what a key policy must name; the same as ARN for a user

	Clock time.Duration `json:"-"` // how far this machine's clock is ahead of AWS's, to a second
}

// WhoAmI asks AWS who the credentials of cfg belong to. assumed is the ARN of the
// role that the environment says we assume (AWS_ROLE_ARN), or "": AWS leaves a
// role's path out of session ARNs, and a key policy needs it. It takes checkCall at most.
func WhoAmI(ctx context.Context, cfg aws.Config, endpoint, assumed string) (Identity, error) {
	ctx, cancel := context.WithTimeout(ctx, checkCall)
	defer cancel()
	client := sts.NewFromConfig(cfg, func(o *sts.Options) {
		if endpoint != "" {
			o.BaseEndpoint = aws.String(endpoint)
		}
	})
	out, err := client.GetCallerIdentity(ctx, &sts.GetCallerIdentityInput{})
	if err != nil {
		return Identity{}, fmt.Errorf("AWS does not tell who we are (sts get-caller-identity): %w", err)
	}
	id := Identity{Account: aws.ToString(out.Account), ARN: aws.ToString(out.Arn)}
	if theirs, ok := awsmiddleware.GetServerTime(out.ResultMetadata); ok {
		id.Clock = time.Since(theirs).Round(time.Second)
	}
	id.Role = awskms.RoleARN(id.ARN)
	if withPath(assumed, id.Role) {
		id.Role = assumed
	}
	return id, nil
}

// withPath tells whether an ARN names the same role as another that lacks the path.
func withPath(full, plain string) bool {
	before, path, ok := strings.Cut(full, ":role/")
	return ok && before+":role/"+path[strings.LastIndex(path, "/")+1:] == plain
}
