#!/usr/bin/env bash
# Creates, with the aws command line, a KMS key that byokd may use: documented policy, alias, tags, yearly
# rotation. Run again it completes what is missing and makes no second key. The same without a script:
#   byokd key create --region REGION --role TENANT_ROLE_ARN
#
# Set the values below, or give them in the environment. With --dry-run it only tells what it would do.
set -euo pipefail

# Credentials of the key's owner. Leave them empty to use those that the aws command line finds by itself
# (a profile, SSO, an instance's role), which is better than writing secrets into a file.
AWS_ACCESS_KEY_ID="${AWS_ACCESS_KEY_ID:-}"
AWS_SECRET_ACCESS_KEY="${AWS_SECRET_ACCESS_KEY:-}"
AWS_SESSION_TOKEN="${AWS_SESSION_TOKEN:-}" # if using temporary credentials

YOUR_ACCOUNT_ID="${YOUR_ACCOUNT_ID:-}"              # 12 digits: the account that owns the key
TENANT_ROLE_ARN="${TENANT_ROLE_ARN:-}"              # the role to be allowed: what `byokd identity` prints
REGION="${REGION:-eu-central-1}"                    # the region of the cluster (or, run again, of the backups)
ALIAS_NAME="${ALIAS_NAME:-camunda-saas-byok}"       # optional
DESCRIPTION="${DESCRIPTION:-KMS key for Camunda SaaS BYOK}"
TAGS="${TAGS:-}"                                    # optional: NAME=VALUE NAME=VALUE
MINIMAL_POLICY="${MINIMAL_POLICY:-no}"              # yes: the smaller policy of the older documentation
WAIT_SECONDS="${WAIT_SECONDS:-300}"                 # how long to wait for a key to become usable
unset REPLICA_REGION # the other script makes a replica

# ---- below this line the two scripts are the same -----------------------------------------------------------

shopt -s inherit_errexit 2>/dev/null || true # bash 3.2 of macOS has no such option
dry_run=no
replica_region=${REPLICA_REGION:-}
mark='byokd:alias' # a tag by which a key is found whose making was interrupted before it had its alias

say() { printf '%s\n' "$*" >&2; }
die() {
  say "error: $*"
  exit 1
}
usage() {
  say "usage: ${0##*/} [--dry-run]"
  say "The values are set at the top of the script, or given in the environment: YOUR_ACCOUNT_ID,"
  say "TENANT_ROLE_ARN, REGION, REPLICA_REGION, ALIAS_NAME, DESCRIPTION, TAGS, MINIMAL_POLICY."
}

# check_values refuses what would only fail half-way, or end up in a policy by its placeholder.
check_values() {
  command -v aws >/dev/null || die "the aws command line is not installed: https://docs.aws.amazon.com/cli/"
  [[ $YOUR_ACCOUNT_ID =~ ^[0-9]{12}$ ]] || die "YOUR_ACCOUNT_ID is '$YOUR_ACCOUNT_ID'; set it to the 12 digits of the account that owns the key"
  [[ $TENANT_ROLE_ARN =~ ^arn:aws[a-z-]*:iam::[0-9]{12}:role/[A-Za-z0-9+=,.@_/-]+$ ]] ||
    die "TENANT_ROLE_ARN is '$TENANT_ROLE_ARN'; set it to the ARN of the role to be allowed, arn:aws:iam::ACCOUNT:role/NAME"
  local region
  for region in "$REGION" $replica_region; do
    [[ $region =~ ^[a-z]{2}(-[a-z]+)+-[0-9]$ ]] || die "'$region' is not the name of a region, such as eu-central-1"
  done
  [[ $REGION != "$replica_region" ]] || die "REPLICA_REGION is the same as REGION ($REGION)"
  [[ $ALIAS_NAME =~ ^[A-Za-z0-9/_-]+$ && $ALIAS_NAME != alias/* && $ALIAS_NAME != aws/* ]] ||
    die "ALIAS_NAME is '$ALIAS_NAME'; give letters, digits, /, _ and -, without alias/"
  [[ $MINIMAL_POLICY == yes || $MINIMAL_POLICY == no ]] || die "MINIMAL_POLICY is '$MINIMAL_POLICY'; say yes or no"
  local tag
  for tag in $TAGS; do
    [[ $tag == ?*=* ]] || die "TAGS: '$tag' is not NAME=VALUE"
  done
}

# use_credentials hands the credentials of the top of this script on to the aws command line.
use_credentials() {
  local name
  for name in AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN; do
    if [[ -n ${!name} ]]; then
      export "${name?}"
    else
      unset "$name"
    fi
  done
  export AWS_PAGER=''
  local account
  account=$(aws sts get-caller-identity --region "$REGION" --query Account --output text) ||
    die "AWS does not accept the credentials (aws sts get-caller-identity)"
  [[ $account == "$YOUR_ACCOUNT_ID" ]] || die "the credentials belong to account $account, YOUR_ACCOUNT_ID is $YOUR_ACCOUNT_ID"
}

# policy prints the documented key policy.
policy() {
  local partition who actions grants
  partition=$(cut -d: -f2 <<<"$TENANT_ROLE_ARN")
  who='Camunda tenant IAM Role'
  actions='"kms:Encrypt", "kms:Decrypt", "kms:ReEncrypt*", "kms:DescribeKey", "kms:GenerateDataKey*"'
  grants='"kms:CreateGrant", "kms:ListGrants", "kms:RevokeGrant"'
  if [[ $MINIMAL_POLICY == yes ]]; then
    who='Camunda Cluster Amazon Role'
    actions='"kms:DescribeKey", "kms:GenerateDataKey*", "kms:Decrypt"'
    grants='"kms:CreateGrant"'
  fi
  cat <<POLICY
{
  "Version": "2012-10-17",
  "Statement": [
    {
      "Sid": "Enable IAM user permissions",
      "Effect": "Allow",
      "Principal": {"AWS": "arn:$partition:iam::$YOUR_ACCOUNT_ID:root"},
      "Action": "kms:*",
      "Resource": "*"
    },
    {
      "Sid": "Allow $who basic key access",
      "Effect": "Allow",
      "Principal": {"AWS": "$TENANT_ROLE_ARN"},
      "Action": [$actions],
      "Resource": "*"
    },
    {
      "Sid": "Allow $who to create grants for provisioning encrypted EBS volumes",
      "Effect": "Allow",
      "Principal": {"AWS": "$TENANT_ROLE_ARN"},
      "Action": [$grants],
      "Resource": "*"
    }
  ]
}
POLICY
}

# tags sets tag_list to the arguments of --tags.
tags() {
  local tag
  tag_list=("TagKey=$mark,TagValue=$ALIAS_NAME")
  for tag in $TAGS; do
    tag_list+=("TagKey=${tag%%=*},TagValue=${tag#*=}")
  done
}

# act WHAT COMMAND...: tells WHAT and runs COMMAND, or only tells in a dry run.
act() {
  if [[ $dry_run == yes ]]; then
    say "would $1"
    return
  fi
  say "$1"
  shift
  "$@"
}

# look REGION KEY: sets arn, state, kind and multi to what AWS says of a key, all empty when there is none.
look() {
  local out
  arn='' state='' kind='' multi=''
  if out=$(aws kms describe-key --region "$1" --key-id "$2" --output text \
    --query 'KeyMetadata.[Arn,KeyState,MultiRegion,KeySpec,KeyUsage]' 2>&1); then
    read -r arn state multi kind <<<"$out"
  elif [[ $out != *NotFoundException* ]]; then
    die "aws kms describe-key --key-id $2 --region $1: $out"
  fi
}

# unnamed sets key to the ARN of a key that an interrupted run made without giving it its alias, if there is one.
unnamed() {
  local candidate candidates tag
  candidates=$(aws kms list-keys --region "$REGION" --query 'Keys[].KeyArn' --output text)
  for candidate in $candidates; do
    [[ $candidate == arn:* ]] || continue # the word None of an empty list
    tag=$(aws kms list-resource-tags --region "$REGION" --key-id "$candidate" \
      --query "Tags[?TagKey=='$mark'].TagValue" --output text 2>/dev/null) || continue # a key that we may not look at
    [[ $tag == "$ALIAS_NAME" ]] || continue
    look "$REGION" "$candidate"
    [[ ($state == Enabled || $state == Creating) && $multi == "$multi_region" ]] || continue
    if [[ $(aws kms list-aliases --region "$REGION" --key-id "$candidate" --query 'length(Aliases)' --output text) == 0 ]]; then
      key=$candidate
      return
    fi
  done
}

# wait_enabled REGION ARN: until the key can be used, at most WAIT_SECONDS.
wait_enabled() {
  local deadline=$((SECONDS + WAIT_SECONDS))
  while true; do
    look "$1" "$2"
    case $state in
      Enabled) return ;;
      '' | Creating | Updating) ;; # AWS is eventually consistent: a new key may not be found yet
      *) die "$2 is $state; enable it, then run this again" ;;
    esac
    ((SECONDS < deadline)) || die "$2 is not usable after $WAIT_SECONDS seconds; run this again later"
    sleep 1
  done
}

# check_existing refuses a key of that alias, as look has found it, that cannot be what is asked for.
check_existing() {
  case $state in
    Enabled | Creating | Updating) ;;
    Disabled) die "alias/$ALIAS_NAME is $arn, which is disabled. Enable it (aws kms enable-key --key-id $arn --region $REGION), or choose another ALIAS_NAME" ;;
    *) die "alias/$ALIAS_NAME is $arn, which is $state. Choose another ALIAS_NAME" ;;
  esac
  [[ $kind == SYMMETRIC_DEFAULT$'\t'ENCRYPT_DECRYPT ]] ||
    die "alias/$ALIAS_NAME is $arn, which is no symmetric key for encryption and decryption ($kind). Choose another ALIAS_NAME"
  [[ $multi_region == False || $multi == True ]] ||
    die "alias/$ALIAS_NAME is $arn, a single-Region key, which cannot be replicated. Choose another ALIAS_NAME"
  say "alias/$ALIAS_NAME in $REGION is there already; its policy is left as it is"
}

create_alias() { aws kms create-alias --region "$1" --alias-name "alias/$ALIAS_NAME" --target-key-id "$2"; }

# make_key sets key to the ARN of the key, made where there is none; empty in a dry run that would make it.
make_key() {
  look "$REGION" "alias/$ALIAS_NAME"
  key=$arn
  if [[ -n $key ]]; then
    check_existing
    act "tag it" aws kms tag-resource --region "$REGION" --key-id "$key" --tags "${tag_list[@]}"
    return
  fi
  unnamed
  if [[ -z $key && $dry_run == yes ]]; then
    say "would create a key in $REGION"
  elif [[ -z $key ]]; then
    local multi_flag=--no-multi-region
    [[ $multi_region == False ]] || multi_flag=--multi-region
    say "create a key in $REGION"
    key=$(aws kms create-key --region "$REGION" "$multi_flag" --description "$DESCRIPTION" --policy "$(policy)" \
      --tags "${tag_list[@]}" --query KeyMetadata.Arn --output text)
  fi
  [[ $dry_run == yes ]] || wait_enabled "$REGION" "$key"
  act "give it the alias $ALIAS_NAME in $REGION" create_alias "$REGION" "$key"
}

rotate() {
  if [[ -n $key ]]; then
    local on
    on=$(aws kms get-key-rotation-status --region "$REGION" --key-id "$key" --query KeyRotationEnabled --output text)
    [[ $on != True ]] || return 0
  fi
  act "switch yearly rotation on" aws kms enable-key-rotation --region "$REGION" --key-id "$key"
}

# make_replica sets replica to the ARN of the replica, made where there is none, with an alias of its own.
make_replica() {
  replica='' arn=''
  [[ -n $replica_region ]] || return 0
  if [[ -n $key ]]; then
    replica=${key/:$REGION:/:$replica_region:}
    look "$replica_region" "$replica"
  fi
  if [[ -z $arn ]]; then
    act "replicate it to $replica_region" replicate
  fi
  [[ $dry_run == yes ]] || wait_enabled "$replica_region" "$replica"
  look "$replica_region" "alias/$ALIAS_NAME"
  if [[ -z $arn ]]; then
    act "give the replica the alias $ALIAS_NAME in $replica_region" create_alias "$replica_region" "$replica"
  elif [[ $arn != "$replica" ]]; then
    die "alias/$ALIAS_NAME in $replica_region is another key, $arn. Remove that alias or choose another ALIAS_NAME"
  fi
}

replicate() {
  aws kms replicate-key --region "$REGION" --key-id "$key" --replica-region "$replica_region" \
    --description "$DESCRIPTION" --policy "$(policy)" --tags "${tag_list[@]}" --output text >/dev/null
}

main() {
  case ${1:-} in
    '') ;;
    --dry-run) dry_run=yes ;;
    -h | --help) usage && exit 0 ;;
    *) usage && exit 2 ;;
  esac
  multi_region=False
  [[ -z $replica_region ]] || multi_region=True
  check_values
  use_credentials
  tags
  make_key
  rotate
  make_replica
  if [[ $dry_run == yes ]]; then
    say "nothing was changed"
    return
  fi
  echo "Key ARN ($REGION): $key"
  [[ -z $replica ]] || echo "Replica key ARN ($replica_region): $replica"
}

main "$@"
