// Uses byokd as applications in JavaScript do. Ends with an error when anything is not as on S3.
import assert from "node:assert/strict";
import { randomBytes } from "node:crypto";
import {
  S3Client, PutObjectCommand, GetObjectCommand, HeadObjectCommand, CopyObjectCommand, ListObjectsV2Command,
  DeleteObjectsCommand, GetObjectTaggingCommand, CreateMultipartUploadCommand, UploadPartCommand, CompleteMultipartUploadCommand,
} from "@aws-sdk/client-s3";
import { Upload } from "@aws-sdk/lib-storage";
import { getSignedUrl } from "@aws-sdk/s3-request-presigner";

const s3 = new S3Client({
  endpoint: process.argv[2], region: "eu-central-1", forcePathStyle: true,
  credentials: { accessKeyId: "byokd", secretAccessKey: "byokd-secret" },
});
const Bucket = "documents";
const bytes = async (out) => Buffer.from(await out.Body.transformToByteArray());

const small = randomBytes(70_000);
await s3.send(new PutObjectCommand({ Bucket, Key: "js/ä b+c", Body: small, Metadata: { title: "x", empty: "" }, Tagging: "a=1" }));
const got = await s3.send(new GetObjectCommand({ Bucket, Key: "js/ä b+c" }));
assert.deepEqual(await bytes(got), small);
assert.deepEqual(got.Metadata, { title: "x", empty: "" });
assert.equal((await s3.send(new GetObjectTaggingCommand({ Bucket, Key: "js/ä b+c" }))).TagSet[0].Value, "1");
await assert.rejects(s3.send(new HeadObjectCommand({ Bucket, Key: "js/none" })), { name: "NotFound" });

const large = randomBytes(12_000_000);
await new Upload({ client: s3, params: { Bucket, Key: "js/large", Body: large }, partSize: 5 << 20 }).done();
assert.deepEqual(await bytes(await s3.send(new GetObjectCommand({ Bucket, Key: "js/large" }))), large);
const range = await s3.send(new GetObjectCommand({ Bucket, Key: "js/large", Range: "bytes=5242870-5242890" }));
assert.equal(range.ContentRange, "bytes 5242870-5242890/12000000");
assert.deepEqual(await bytes(range), large.subarray(5242870, 5242891));
await s3.send(new CopyObjectCommand({ Bucket: "backups", Key: "js/copy", CopySource: `${Bucket}/js/large` }));
assert.equal((await s3.send(new HeadObjectCommand({ Bucket: "backups", Key: "js/copy" }))).ContentLength, large.length);

// The SDK compares what it downloads with the checksum of the whole.
const Key = "js/summed";
const { UploadId } = await s3.send(new CreateMultipartUploadCommand({ Bucket, Key, ChecksumAlgorithm: "CRC32", ChecksumType: "FULL_OBJECT" }));
const Parts = [];
for (const [i, Body] of [large.subarray(0, 6 << 20), large.subarray(6 << 20)].entries()) {
  const part = await s3.send(new UploadPartCommand({ Bucket, Key, UploadId, PartNumber: i + 1, Body, ChecksumAlgorithm: "CRC32" }));
  Parts.push({ PartNumber: i + 1, ETag: part.ETag, ChecksumCRC32: part.ChecksumCRC32 });
}
const whole = await s3.send(new CompleteMultipartUploadCommand({ Bucket, Key, UploadId, ChecksumType: "FULL_OBJECT", MultipartUpload: { Parts } }));
const summed = await s3.send(new GetObjectCommand({ Bucket, Key, ChecksumMode: "ENABLED" }));
assert.ok(whole.ChecksumCRC32);
assert.deepEqual([summed.ChecksumCRC32, summed.ChecksumType], [whole.ChecksumCRC32, "FULL_OBJECT"]);
assert.deepEqual(await bytes(summed), large);
await s3.send(new DeleteObjectsCommand({ Bucket, Delete: { Objects: [{ Key }] } }));

const link = await getSignedUrl(s3, new GetObjectCommand({ Bucket, Key: "js/ä b+c" }), { expiresIn: 300 });
const answer = await fetch(link);
assert.equal(answer.status, 200);
assert.deepEqual(Buffer.from(await answer.arrayBuffer()), small);

const listed = await s3.send(new ListObjectsV2Command({ Bucket, Prefix: "js/" }));
assert.deepEqual(listed.Contents.map((o) => [o.Key, o.Size]), [["js/large", large.length], ["js/ä b+c", small.length]]);
const removed = await s3.send(new DeleteObjectsCommand({ Bucket, Delete: { Objects: listed.Contents.map(({ Key }) => ({ Key })) } }));
assert.equal(removed.Deleted.length, 2);
console.log("js: all as on S3");
