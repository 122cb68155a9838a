import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.nio.ByteBuffer;
import java.time.Duration;
import java.util.Arrays;
import java.util.Base64;
import java.util.List;
import java.util.Map;
import java.util.Random;
import java.util.zip.CRC32;
import software.amazon.awssdk.auth.credentials.AwsBasicCredentials;
import software.amazon.awssdk.auth.credentials.StaticCredentialsProvider;
import software.amazon.awssdk.core.async.AsyncRequestBody;
import software.amazon.awssdk.core.async.AsyncResponseTransformer;
import software.amazon.awssdk.core.sync.RequestBody;
import software.amazon.awssdk.regions.Region;
import software.amazon.awssdk.services.s3.S3AsyncClient;
import software.amazon.awssdk.services.s3.S3Client;
import software.amazon.awssdk.services.s3.S3Configuration;
import software.amazon.awssdk.services.s3.model.*;
import software.amazon.awssdk.services.s3.presigner.S3Presigner;

/**
 * Uses byokd as Java applications do: the document store's sequence with the synchronous client, the Zeebe backup
 * store's with the asynchronous one on Netty. Ends with an exception when anything is not as on S3.
 */
public final class Client {
  private static final String BUCKET = "documents";

  public static void main(String[] args) throws Exception {
    var endpoint = URI.create(args[0]);
    var credentials = StaticCredentialsProvider.create(AwsBasicCredentials.create("byokd", "byokd-secret"));
    try (var s3 = S3Client.builder().endpointOverride(endpoint).region(Region.EU_CENTRAL_1).credentialsProvider(credentials).forcePathStyle(true).build()) {
      documents(s3);
      multipart(s3);
      summed(s3);
    }
    try (var s3 = S3AsyncClient.builder().endpointOverride(endpoint).region(Region.EU_CENTRAL_1).credentialsProvider(credentials).forcePathStyle(true).build()) {
      backups(s3);
    }
    try (var presigner = S3Presigner.builder().endpointOverride(endpoint).region(Region.EU_CENTRAL_1).credentialsProvider(credentials)
        .serviceConfiguration(S3Configuration.builder().pathStyleAccessEnabled(true).build()).build()) {
      link(presigner);
    }
    System.out.println("java: all as on S3");
  }

  /** The operations of Camunda's document store, in its order. */
  private static void documents(S3Client s3) {
    var key = "store/java";
    s3.headBucket(b -> b.bucket(BUCKET));
    try {
      s3.headObject(b -> b.bucket(BUCKET).key(key));
      throw new AssertionError("an absent document is there");
    } catch (NoSuchKeyException absent) {
      check(absent.statusCode() == 404, "status of an absent document");
    }
    var content = bytes(100_000, 1);
    var meta = Map.of("filename", "offer.pdf", "expires-at", "");
    s3.putObject(b -> b.bucket(BUCKET).key(key).metadata(meta).tagging("").contentType("application/pdf"), RequestBody.fromBytes(content));
    s3.copyObject(b -> b.sourceBucket(BUCKET).sourceKey(key).destinationBucket(BUCKET).destinationKey(key)
        .metadataDirective(MetadataDirective.REPLACE).contentType("application/pdf").metadata(Map.of("filename", "offer.pdf", "contenthash", "abc", "expires-at", "")));
    var got = s3.getObjectAsBytes(b -> b.bucket(BUCKET).key(key));
    check(Arrays.equals(got.asByteArray(), content), "content of the document");
    check(got.response().metadata().equals(Map.of("filename", "offer.pdf", "contenthash", "abc", "expires-at", "")), "metadata " + got.response().metadata());
    check("application/pdf".equals(got.response().contentType()), "content type");
  }

  private static void multipart(S3Client s3) {
    var key = "java/multipart";
    var content = bytes(11_000_000, 2);
    var id = s3.createMultipartUpload(b -> b.bucket(BUCKET).key(key).checksumAlgorithm(ChecksumAlgorithm.CRC32)).uploadId();
    int cut = 6 << 20;
    var second = s3.uploadPart(b -> b.bucket(BUCKET).key(key).uploadId(id).partNumber(2).checksumAlgorithm(ChecksumAlgorithm.CRC32), RequestBody.fromBytes(Arrays.copyOfRange(content, cut, content.length)));
    var first = s3.uploadPart(b -> b.bucket(BUCKET).key(key).uploadId(id).partNumber(1).checksumAlgorithm(ChecksumAlgorithm.CRC32), RequestBody.fromBytes(Arrays.copyOf(content, cut)));
    s3.completeMultipartUpload(b -> b.bucket(BUCKET).key(key).uploadId(id).multipartUpload(m -> m.parts(
        CompletedPart.builder().partNumber(1).eTag(first.eTag()).checksumCRC32(first.checksumCRC32()).build(),
        CompletedPart.builder().partNumber(2).eTag(second.eTag()).checksumCRC32(second.checksumCRC32()).build())));
    var range = s3.getObjectAsBytes(b -> b.bucket(BUCKET).key(key).range("bytes=" + (cut - 10) + "-" + (cut + 9)));
    check(Arrays.equals(range.asByteArray(), Arrays.copyOfRange(content, cut - 10, cut + 10)), "range across parts");
    check(s3.headObject(b -> b.bucket(BUCKET).key(key)).contentLength() == content.length, "length of parts");
    check(s3.listObjectsV2(b -> b.bucket(BUCKET).prefix("java/")).contents().get(0).size() == content.length, "listed length of parts");
  }

  /** An upload in parts with a checksum of the whole, which the SDK compares with what it downloads. */
  private static void summed(S3Client s3) {
    var key = "summed/multipart";
    var content = bytes(11_000_000, 3);
    var id = s3.createMultipartUpload(b -> b.bucket(BUCKET).key(key).checksumAlgorithm(ChecksumAlgorithm.CRC32).checksumType(ChecksumType.FULL_OBJECT)).uploadId();
    int cut = 6 << 20;
    var first = s3.uploadPart(b -> b.bucket(BUCKET).key(key).uploadId(id).partNumber(1).checksumAlgorithm(ChecksumAlgorithm.CRC32), RequestBody.fromBytes(Arrays.copyOf(content, cut)));
    var second = s3.uploadPart(b -> b.bucket(BUCKET).key(key).uploadId(id).partNumber(2).checksumAlgorithm(ChecksumAlgorithm.CRC32), RequestBody.fromBytes(Arrays.copyOfRange(content, cut, content.length)));
    var whole = s3.completeMultipartUpload(b -> b.bucket(BUCKET).key(key).uploadId(id).checksumType(ChecksumType.FULL_OBJECT).multipartUpload(m -> m.parts(
        CompletedPart.builder().partNumber(1).eTag(first.eTag()).checksumCRC32(first.checksumCRC32()).build(),
        CompletedPart.builder().partNumber(2).eTag(second.eTag()).checksumCRC32(second.checksumCRC32()).build())));
    var crc = new CRC32();
    crc.update(content);
    check(Base64.getEncoder().encodeToString(ByteBuffer.allocate(4).putInt((int) crc.getValue()).array()).equals(whole.checksumCRC32()), "checksum of the whole " + whole);
    var got = s3.getObjectAsBytes(b -> b.bucket(BUCKET).key(key).checksumMode(ChecksumMode.ENABLED));
    check(Arrays.equals(got.asByteArray(), content), "content of the whole");
    check(whole.checksumCRC32().equals(got.response().checksumCRC32()) && got.response().checksumType() == ChecksumType.FULL_OBJECT, "checksum read " + got.response());
  }

  /** The operations of Zeebe's backup store: manifest by compare-and-swap, files, listing in pages, quiet deletion. */
  private static void backups(S3AsyncClient s3) throws Exception {
    var manifest = "backups/1/2/manifest.json";
    var stored = s3.putObject(b -> b.bucket(BUCKET).key(manifest).ifNoneMatch("*").contentType("application/json"), AsyncRequestBody.fromString("{\"status\":\"IN_PROGRESS\"}")).get();
    try {
      s3.putObject(b -> b.bucket(BUCKET).key(manifest).ifNoneMatch("*"), AsyncRequestBody.fromString("x")).get();
      throw new AssertionError("a manifest was replaced");
    } catch (java.util.concurrent.ExecutionException refused) {
      check(((S3Exception) refused.getCause()).statusCode() == 412, "status of a refused manifest");
    }
    for (int i = 0; i < 5; i++) {
      var name = "backups/1/2/files/" + i;
      var size = i * 70_000;
      s3.putObject(b -> b.bucket(BUCKET).key(name), AsyncRequestBody.fromBytes(bytes(size, size))).get();
    }
    s3.putObject(b -> b.bucket(BUCKET).key(manifest).ifMatch(stored.eTag()), AsyncRequestBody.fromString("{\"status\":\"COMPLETED\"}")).get();
    check(s3.getObject(b -> b.bucket(BUCKET).key(manifest), AsyncResponseTransformer.toBytes()).get().asUtf8String().contains("COMPLETED"), "the manifest");
    try {
      s3.getObject(b -> b.bucket(BUCKET).key("backups/9/manifest.json"), AsyncResponseTransformer.toBytes()).get();
      throw new AssertionError("an absent manifest is there");
    } catch (java.util.concurrent.ExecutionException absent) {
      check(absent.getCause() instanceof NoSuchKeyException, "an absent manifest is " + absent.getCause());
    }
    int listed = 0;
    String token = null;
    do {
      var from = token;
      var page = s3.listObjectsV2(b -> b.bucket(BUCKET).prefix("backups/1/2/").maxKeys(4).continuationToken(from)).get();
      listed += page.contents().size();
      token = page.nextContinuationToken();
      List<ObjectIdentifier> ids = page.contents().stream().map(o -> ObjectIdentifier.builder().key(o.key()).build()).toList();
      check(s3.deleteObjects(b -> b.bucket(BUCKET).delete(d -> d.quiet(true).objects(ids))).get().errors().isEmpty(), "deletion");
    } while (token != null);
    check(listed == 6, "listed " + listed);
  }

  private static void link(S3Presigner presigner) throws Exception {
    var url = presigner.presignGetObject(b -> b.signatureDuration(Duration.ofMinutes(5)).getObjectRequest(g -> g.bucket(BUCKET).key("store/java"))).url();
    var answer = HttpClient.newHttpClient().send(HttpRequest.newBuilder(url.toURI()).build(), HttpResponse.BodyHandlers.ofByteArray());
    check(answer.statusCode() == 200 && Arrays.equals(answer.body(), bytes(100_000, 1)), "the link answers " + answer.statusCode());
  }

  private static byte[] bytes(int size, long seed) {
    var content = new byte[size];
    new Random(seed).nextBytes(content);
    return content;
  }

  private static void check(boolean holds, String what) {
    if (!holds) {
      throw new AssertionError(what);
    }
  }
}
